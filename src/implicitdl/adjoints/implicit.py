"""The exact gradient, by the implicit function theorem: the adjoint solve, and the solution with its derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .._internal.context import batched_by_autograd, has_tangent, plain, without_grad
from .._internal.errors import wrong
from ..equations.function import FunctionMap, OneRow
from ..equations.map import Linearization, LinearMap, Map, vjp
from ..loop.announce import announce_miss
from ..loop.coupling import announce_coupling, are_coupled
from ..loop.iterate import SolveResult, iterate
from ..solution import BackwardReport, OnFailure, monitored
from ..solvers import Auto, Solver
from .base import Adjoint
from .cotangents import each, many
from .guard import FirstOrderOnly


@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(Adjoint):
    """The exact gradient, by the implicit function theorem: v = g + Jᵀv, solved like the equilibrium itself.

    Bias: none beyond the two tolerances.  Cost: one evaluation of f, whose graph is all that is kept however many
    steps the solve takes, and one product with Jᵀ a step of the adjoint solve.

    Arguments:
        order: 1 gives the first derivative, also under ``create_graph=True``, and raises where a second one is
            taken.  2 gives exact second derivatives, and raises at the third; it costs one more evaluation of f.
        solver: solves the adjoint equation; its tolerance is the gradient's.

    Source: Bai, Kolter & Koltun, Deep Equilibrium Models (2019), Theorem 1; order 2 is derived at `second_order`.

    Example:
        >>> import torch
        >>> from implicitdl import fixed_point
        >>> b = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
        >>> fixed_point(lambda x, b: 0.5 * x + b, torch.zeros_like(b), b).value.backward()
        >>> round(b.grad.item(), 6)
        2.0
    """

    order: Literal[1, 2] = 1
    solver: Solver = field(default_factory=Auto)

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise wrong("ImplicitAdjoint", "order to be 1 or 2", repr(self.order))

    def solve(
        self, f: Map, x0: Tensor | None, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> SolveResult:
        result = iterate(f, x0, solver, trace=trace)
        if not torch.is_grad_enabled():
            return result
        at = f.linearize(result.x, result.slope)
        if at is None or (at.weights is None and not at.value.requires_grad):
            return result
        if isinstance(f, FunctionMap):  # whose evaluation shows whether samples influence one another
            result.fx = at.value.detach()
        backward = BackwardSolve(f, at, self.solver, on_failure, trace, report)
        if self.order == 1:
            result.x = attached(at, result.x, backward)
        else:
            result.x = second_order(f, at.value, result.x, backward)
        return result


@dataclass(frozen=True)
class BackwardSolve:
    """v = g + Jᵀv at one solution, and its report.

    Attributes:
        start: where to look for v, given g; by default at the first term of its Neumann series.
    """

    f: Map
    at: Linearization
    solver: Solver
    on_failure: OnFailure
    trace: bool
    report: BackwardReport
    start: Callable[[Tensor], Tensor] | None = None

    def __call__(self, g: Tensor) -> Tensor:
        return self._solve("backward", g, self.at.adjoint_map, self.report)

    def transposed(self, h: Tensor) -> Tensor:
        """w = h + J w, the solve that forward mode needs, and a second derivative."""
        return self._solve("tangent", h, self.at.tangent_map, BackwardReport())

    def _solve(self, which: str, g: Tensor, problem: Callable[[Tensor], LinearMap], report: BackwardReport) -> Tensor:
        if not plain() or batched_by_autograd(g):
            if many(g):
                return each(partial(self._solve, which, problem=problem, report=report), g)
            if has_tangent(g):
                raise wrong(
                    which, "cotangents without tangents for a solution found outside of forward mode", "dual numbers",
                    "Make the solve inside torch.autograd.forward_ad.dual_level() too.",
                )  # fmt: skip
        linear = problem(g.detach())
        result = iterate(linear, None if self.start is None else self.start(g), self.solver, trace=self.trace)
        if isinstance(self.f, OneRow):
            result.stats = result.stats.of_each(self.f.samples)
        elif isinstance(self.f, FunctionMap) and not self.f.independent and len(g) > 1:
            result = self._together(which, linear, result)
        report.stats = result.stats
        monitored("backward", result.stats)
        if not result.all_converged:
            who = f"{which}({type(self.solver).__name__})"
            announce_miss(who, "backward", result, self.solver, self.on_failure)
        return result.x

    def _together(self, which: str, linear: LinearMap, alone: SolveResult) -> SolveResult:
        """The result of the batch as one row, where its samples influence one another; else what they found alone."""
        # Cotangents of unlike sizes, each solved in units of its own, are apart from the beginning.
        alone.apart = True
        with without_grad():
            if not are_coupled(linear, alone):
                return alone
        announce_coupling(f"{which}({type(self.solver).__name__})")
        one = OneRow.of(linear, len(alone.x))
        joint = iterate(one, one.together(alone.x), self.solver, trace=self.trace)
        joint.x, joint.stats = one.apart(joint.x), joint.stats.of_each(one.samples).after(alone.stats)
        return joint


def attached(at: Linearization, x: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
    """The solution x as a function of the weights, by the graph of f(x) or by its closed form."""
    weights = (at.value,) if at.weights is None else at.weights
    solution: Tensor = ImplicitGradient.apply(at, x, backward, *weights)
    return solution


class ImplicitGradient(torch.autograd.Function):
    """x* as a function of its weights: backward turns a cotangent g into v = g + Jᵀv and pulls v back through f.

    Where f has no closed form, f(x*) with its graph stands for the weights.
    """

    @staticmethod
    def forward(ctx: Any, at: Linearization, x: Tensor, solve: Callable[[Tensor], Tensor], *weights: Tensor) -> Tensor:
        ctx.solve, ctx.at = solve, None
        if at.weights is None:
            ctx.save_for_backward(*weights)
            return x.detach()
        ctx.at = at
        ctx.save_for_backward(*weights, x)
        return x.clone()  # what the user does to it in place must not reach the x that backward reads

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        v, at = first_order(ctx, g), ctx.at
        pulled = (v,) if at is None else at.pull(ctx.saved_tensors[-1], v)
        return None, None, None, *pulled


def first_order(ctx: Any, g: Tensor) -> Tensor:
    """The adjoint of g, guarded: under create_graph the first derivative is right, and a second one would not be."""
    v: Tensor = ctx.solve(g)
    return FirstOrderOnly.apply(v, g, *ctx.saved_tensors) if torch.is_grad_enabled() else v


def second_order(f: Map, fx: Tensor, x: Tensor, backward: BackwardSolve) -> Tensor:
    """x* = x + S(f(x) − x), S = (I − J(x))⁻¹ with a derivative of its own; exact to second order.

    One Newton step doubles the order of a derivative as it doubles digits.  Take x exact to first order; then
    w = f(x) − x = 0 and dw = ∂f + (J − I)dx, so the first derivative dx + S dw = S ∂f does not depend on dx, and
    the second needs no more than dx, dS and d²f.  In the first backward the cotangents that reach x cancel,
    g + Jᵀv − v = 0; in the second they carry what depends on x.
    """
    point: Tensor
    point, first_order_part = _Point.apply(fx, x, backward)
    solution: Tensor = _NewtonStep.apply(f(point), point, first_order_part, x, backward)
    return solution


class _Point(torch.autograd.Function):
    """x*, exact to first order, for f to be evaluated at, beside an outlet for the cotangent to be cancelled there.

    f's first derivative sends Jᵀv into the point, and `_NewtonStep` sends −Jᵀv into the outlet.  Apart, one can see
    that their sum is rounding, and stop: the first backward then costs no second solve and meets no guard.
    """

    @staticmethod
    def forward(ctx: Any, fx: Tensor, x: Tensor, backward: BackwardSolve) -> tuple[Tensor, Tensor]:
        ctx.solve = backward
        ctx.save_for_backward(fx)
        return x.detach(), torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, from_f: Tensor, first_order_part: Tensor) -> tuple[Tensor | None, ...]:
        g = from_f + first_order_part
        # A thousand roundings: both sides are the same product, summed by f's graph in an order of its own.
        rounding = 1e3 * torch.finfo(g.dtype).eps * first_order_part.abs().amax(dim=1)
        if not many(g) and bool((g.abs().amax(dim=1) <= rounding).all()):
            return None, None, None
        return first_order(ctx, g), None, None


class _NewtonStep(torch.autograd.Function):
    """x + S(f(x) − x), where f(x) = x: the value is x, backward is the adjoint solve, differentiable."""

    @staticmethod
    def forward(
        ctx: Any, fx: Tensor, point: Tensor, first_order_part: Tensor, x: Tensor, backward: BackwardSolve
    ) -> Tensor:
        ctx.solve = backward
        ctx.save_for_backward(fx, point)
        return x.clone()  # the user may change it in place, and backward reads the point

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        v = ctx.solve(g)
        fx, point = ctx.saved_tensors
        Jtv = vjp(fx, point, v, create_graph=torch.is_grad_enabled())
        if torch.is_grad_enabled():
            left = g + Jtv if ctx.solve.at.root else g + Jtv - v
            v = v + _TransposedSolve.apply(left, fx, ctx.solve)
        with torch.no_grad():
            cancelling = -Jtv
        return v, None, cancelling, None, None


class _TransposedSolve(torch.autograd.Function):
    """r ↦ (I − Jᵀ)⁻¹ r at r = 0, the derivative of v = g + Jᵀv; first order only."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, fx: Tensor, backward: BackwardSolve) -> Tensor:
        ctx.solve = backward
        ctx.save_for_backward(fx)
        return torch.zeros_like(r)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        w = ctx.solve.transposed(h)
        if torch.is_grad_enabled():
            w = FirstOrderOnly.apply(w, h, *ctx.saved_tensors)
        return w, None, None
