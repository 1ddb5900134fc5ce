"""torch.func and forward mode through a solve: one Function of explicit inputs, closed under differentiation.

With J = ∂f/∂x at the solution, three equations y = F(y, τ) are enough:

    the state     x = f(x, θ)
    its adjoint   v = g + Jᵀv       τ = (θ, x, g)
    its tangent   w = h + J w       τ = (θ, x, h)

because the derivative of each is another of them.  Along τ̇ it is ẏ = F_τ τ̇ + F_y ẏ, and a cotangent c becomes F_τᵀ u
with u = c + F_yᵀ u, where F_y is J, Jᵀ and J in turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._internal.context import require_constant
from .._internal.errors import wrong
from ..equations.equilibrium import Equilibrium
from ..equations.map import Explicit, Map
from ..loop.announce import announce_miss
from ..loop.iterate import iterate
from ..solution import BackwardReport, OnFailure, Solution, SolveStats, monitored
from ..solvers import Solver
from . import Adjoint, ImplicitAdjoint
from .guard import beyond_order
from .implicit import BackwardSolve


def solve(who: str, f: Any, x0: Any, solver: Solver, adjoint: Adjoint, on_failure: OnFailure, trace: bool) -> Solution:
    """`fixed_point` inside a transform; its report of the backward solve stays empty, and monitors see every solve."""
    if torch.compiler.is_compiling():
        raise wrong(
            who, "to run on numbers", "torch.export", "A solve takes as many steps as they need, which no graph holds."
        )
    where = "under torch.func's transforms and in forward-mode differentiation"
    if not isinstance(f, Equilibrium):
        raise wrong(
            who, f"an Equilibrium {where}", "a function",
            "What it closes over is out of their reach. Pass Equilibrium(A, b, φ), or differentiate with "
            "torch.autograd.",
        )  # fmt: skip
    if not isinstance(adjoint, ImplicitAdjoint):
        raise wrong(who, f"adjoint=ImplicitAdjoint() {where}", type(adjoint).__name__)
    problem = f.reduced()
    explicit: Explicit = problem.explicit()
    tensors = (*explicit.weights, *explicit.rows, problem.rows(x0).detach())
    *constants, start = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in tensors)
    refusal = wrong(
        who, f"an activation without parameters {where}", "one that closes over a tensor they act on",
        "Only A and b are in their reach.",
    )  # fmt: skip
    require_constant(explicit.build(*constants)(start), refusal)
    settings = _Settings(explicit.build, len(explicit.weights), who, solver, adjoint, on_failure, trace)
    x, residual, steps, converged, residuals = _Solve.apply(_State(settings, adjoint.order), *tensors)
    stats = SolveStats(residual, steps, converged, residuals.t() if trace else None)
    return Solution(value=problem.state(x), stats=stats)


@dataclass(frozen=True)
class _Settings:
    build: Callable[..., Map]
    weights: int
    who: str
    solver: Solver
    adjoint: ImplicitAdjoint
    on_failure: OnFailure
    trace: bool


@dataclass(frozen=True)
class _Equation(ABC):
    """y = F(y, \\*weights, \\*rows, start), whose derivatives are known up to an order.

    It holds no tensor.  All tensors but the first few, the weights, have a row for each sample; the last is where to
    start looking for y.
    """

    settings: _Settings
    order: int
    transposed: bool = False  # whether F_y is Jᵀ

    @abstractmethod
    def find(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """y, and figures about it; called with plain tensors, below every transform."""

    @abstractmethod
    def value(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """F(y, τ), in operations that every transform goes through."""

    def point(self, y: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(\\*θ, x): where J is taken."""
        return tensors[:-1]

    def along(self, y: Tensor, tensors: tuple[Tensor, ...], h: Tensor) -> Tensor:
        """ẏ = h + F_y ẏ."""
        return self._derived(y, tensors, h, self.transposed)

    def against(self, y: Tensor, tensors: tuple[Tensor, ...], c: Tensor) -> Tensor:
        """u = c + F_yᵀ u."""
        return self._derived(y, tensors, c, not self.transposed)

    def _derived(self, y: Tensor, tensors: tuple[Tensor, ...], constant: Tensor, transposed: bool) -> Tensor:
        if self.order == 0:
            raise beyond_order()
        solution: Tensor
        linear = _Linear(self.settings, self.order - 1, transposed)
        (solution,) = _Solve.apply(linear, *self.point(y, tensors), constant)
        return solution


class _State(_Equation):
    """x = f(x, θ)."""

    def find(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        s = self.settings
        *theta, x0 = tensors
        result = iterate(s.build(*theta), x0, s.solver, trace=s.trace)
        stats = result.stats
        monitored("forward", stats)
        if not result.all_converged:
            announce_miss(s.who, "forward", result, s.solver, s.on_failure)
        # The length of a trace is a matter of its numbers, which the transforms that stand above cannot see.
        trace = stats.residual.new_full((len(x0), s.solver.max_steps if s.trace else 0), torch.nan)
        if stats.trace is not None:
            trace[:, : len(stats.trace)] = stats.trace.t()
        # What a Function returns must not be what it was given.
        x = result.x.clone() if result.x is x0 else result.x
        return x, stats.residual, stats.steps, stats.converged, trace

    def value(self, y: Tensor, *tensors: Tensor) -> Tensor:
        return self.settings.build(*tensors[:-1])(y)

    def point(self, y: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*tensors[:-1], y)


class _Linear(_Equation):
    """w = h + J w at x, or, transposed, v = g + Jᵀ v; the last tensor is the constant term."""

    def find(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        s = self.settings
        *theta, x, constant = tensors
        f = s.build(*theta)
        at = f.linearize(x)
        assert at is not None, "an explicit map has its linearisation in closed form"
        inverse = BackwardSolve(f, at, s.adjoint.solver, s.on_failure, trace=False, report=BackwardReport())
        return (inverse(constant) if self.transposed else inverse.transposed(constant),)

    def value(self, y: Tensor, *tensors: Tensor) -> Tensor:
        *theta, x, constant = tensors
        f = self.settings.build(*theta)
        return constant + (_vjp(f, x)(y)[0] if self.transposed else _jvp(f, (x,), (y,)))


class _Solve(torch.autograd.Function):
    """The solution of an equation as a function of all that is in it."""

    @staticmethod
    def forward(equation: _Equation, *tensors: Tensor) -> tuple[Tensor, ...]:
        return equation.find(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.equation, *tensors = inputs
        y, *figures = output
        ctx.figures = len(figures)
        ctx.mark_non_differentiable(*figures)
        ctx.save_for_backward(y, *tensors)
        ctx.save_for_forward(y, *tensors)

    @staticmethod
    def backward(ctx: Any, c: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The function that torch.func.vjp returns runs when its level is closed.  What was saved there is let out of it
        # by any operation, and by nothing else before another level is opened, as it is below.
        y, *tensors = (t.view_as(t) for t in ctx.saved_tensors)
        u = ctx.equation.against(y, tuple(tensors), c)
        return None, *_vjp(lambda *t: ctx.equation.value(y, *t), *tensors)(u)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # torch leaves forward mode off in here, which loses the tangents of an outer one (pytorch issue 197867).
        with forward_ad._set_fwd_grad_enabled(True):
            y, *tensors = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            given = tuple(torch.zeros_like(t) if d is None else d for t, d in zip(tensors, tangents, strict=True))
            h = _jvp(lambda *t: ctx.equation.value(y, *t), tuple(tensors), given)
            return ctx.equation.along(y, tuple(tensors), h), *[None] * ctx.figures

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], equation: _Equation, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], int]:
        """More rows of the same equation where the weights are shared, else the equation of each model in turn."""
        dims, models = in_dims[1:], info.batch_size
        shared = equation.settings.weights
        if any(dim is not None for dim in dims[:shared]):

            def of(model: int) -> Iterator[Tensor]:
                return (t if d is None else t.select(d, model) for t, d in zip(tensors, dims, strict=True))

            each = [_Solve.apply(equation, *of(model)) for model in range(models)]
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), 0
        rows = [
            (t.expand(models, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
            for t, d in zip(tensors[shared:], dims[shared:], strict=True)
        ]
        found = _Solve.apply(equation, *tensors[:shared], *rows)
        return tuple(part.unflatten(0, (models, -1)) for part in found), 0


def _vjp(f: Callable[..., Any], *at: Tensor) -> Callable[[Any], tuple[Tensor, ...]]:
    """c ↦ Jᵀc of every argument."""
    pull: Callable[[Any], tuple[Tensor, ...]] = torch.func.vjp(f, *at)[1]
    return pull


def _jvp(f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    """By transposing c ↦ Jᵀc, which is linear, so that it nests with every transform, forward mode included."""
    value, pull = torch.func.vjp(f, *at)[:2]
    (product,) = _vjp(pull, torch.zeros_like(value))(along)
    return product
