"""How the gradient gets through a solution: exactly, by a few steps, or through the iterations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ._checks import positive_int, wrong
from .equilibrium import Linearization, RowMap
from .iterate import Outcome, iterate
from .linearize import AdjointMap, linearize, vjp
from .solution import BackwardReport, OnFailure, announce
from .solvers import Auto, Solver
from .solvers.base import check_damping


class Adjoint(ABC):
    """From the map and a start to the solution with its gradient; `fixed_point` checks and reports around it."""

    @abstractmethod
    def solve(
        self, f: RowMap, x0: Tensor, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> tuple[Tensor, Outcome]:
        """The solution, (batch, d), with its graph, and the figures of the forward solve."""


@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(Adjoint):
    """The exact gradient, by the implicit function theorem: v = g + Jᵀv, solved like the equilibrium itself.

    Memory does not grow with the number of steps, since nothing of the iteration is kept.

    Arguments:
        order: 1 gives the first derivative, also under ``create_graph=True``, and raises where a second one is
            taken.  2 gives exact second derivatives, and raises at the third; it costs one more evaluation of f.
        solver: solves the adjoint equation; its tolerance is the gradient's.

    Source: Bai, Kolter & Koltun, Deep Equilibrium Models (2019), Theorem 1; order 2 is derived at `_second_order`.

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
        self, f: RowMap, x0: Tensor, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> tuple[Tensor, Outcome]:
        with torch.no_grad():
            outcome = iterate(f, x0, solver, trace=trace)
        if not torch.is_grad_enabled():
            return outcome.x, outcome
        at = linearize(f, outcome.x)
        if at is None or not at.value.requires_grad:
            return outcome.x, outcome
        backward = _BackwardSolve(at, self.solver, on_failure, trace, report)
        if self.order == 1:
            return _Attach.apply(at.value, outcome.x, backward), outcome
        return _second_order(f, at.value, outcome.x, backward), outcome


@dataclass(frozen=True, kw_only=True)
class PhantomGradient(Adjoint):
    """An approximate gradient: that of a few damped steps taken at the solution.  Cheap, and biased.

    The adjoint's Neumann series is cut after ``steps`` terms, so the error decays like ‖J‖^steps.  One step is the
    Jacobian-free backpropagation of Wu Fung et al.

    Arguments:
        steps: how many steps at the solution are differentiated; their activations are kept.
        damping: τ in x ← (1 − τ) x + τ f(x).

    Source: Geng et al., On Training Implicit Models (2021), eq. (9); Wu Fung et al., JFB (2021).
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        positive_int("PhantomGradient", "steps", self.steps)
        check_damping("PhantomGradient", self.damping)

    def solve(
        self, f: RowMap, x0: Tensor, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> tuple[Tensor, Outcome]:
        with torch.no_grad():
            outcome = iterate(f, x0, solver, trace=trace)
        if not torch.is_grad_enabled():
            return outcome.x, outcome
        x = outcome.x.detach()
        for _ in range(self.steps):
            x = f(x) if self.damping == 1.0 else x.lerp(f(x), self.damping)
        # The value stays the one whose residual is reported; only the gradient is that of the steps.
        return outcome.x + (x - x.detach()), outcome


@dataclass(frozen=True, kw_only=True)
class Unrolled(Adjoint):
    """Backpropagation through the solver's own iterations: exact for what was computed, at the memory of every step.

    The gradient approaches the exact one as the solve converges.  With Picard so do derivatives of every order; those
    of an accelerated solver also contain its coefficients, whose second derivatives do not settle.
    """

    def solve(
        self, f: RowMap, x0: Tensor, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> tuple[Tensor, Outcome]:
        if getattr(f, "triangular", False) and torch.is_grad_enabled():
            raise wrong(
                "Unrolled", "a map that is iterated", "a triangular equilibrium, solved by substitution",
                "Use ImplicitAdjoint(), which costs one substitution.",
            )  # fmt: skip
        outcome = iterate(f, x0, solver, trace=trace)
        return outcome.x, outcome


@dataclass(frozen=True)
class _BackwardSolve:
    """v = g + Jᵀv at one solution, and its report."""

    at: Linearization
    solver: Solver
    on_failure: OnFailure
    trace: bool
    report: BackwardReport

    def __call__(self, g: Tensor) -> Tensor:
        return self._solve(g, self.at.adjoint_map, report=True)

    def transposed(self, h: Tensor) -> Tensor:
        """w = h + J w, the solve that a second derivative needs."""
        return self._solve(h, lambda h: AdjointMap(self.at.jvp, h), report=False)

    def _solve(self, g: Tensor, problem: Callable[[Tensor], RowMap], *, report: bool) -> Tensor:
        with torch.no_grad():
            # Cotangents come in any size; squared norms of 1e-23 and less would underflow in float32.
            scale = torch.linalg.vector_norm(g, ord=float("inf"), dim=1, keepdim=True)
            unit = g / scale.clamp_(min=torch.finfo(g.dtype).tiny)
            outcome = iterate(problem(unit), unit, self.solver, trace=self.trace)
            if report:
                self.report.residual, self.report.steps = outcome.residual, outcome.steps
                self.report.converged, self.report.trace = outcome.converged, outcome.trace
                announce(
                    f"backward({type(self.solver).__name__})", "backward", outcome.residual, outcome.steps,
                    outcome.converged, outcome.all_converged, outcome.rtol, self.solver.max_steps, self.on_failure,
                )  # fmt: skip
            return outcome.x * scale


class _Attach(torch.autograd.Function):
    """The solution as a function of f(x*): backward turns the cotangent g into v = g + Jᵀv and sends it into f."""

    @staticmethod
    def forward(ctx: Any, fx: Tensor, x: Tensor, backward: _BackwardSolve) -> Tensor:
        ctx.solve = backward
        ctx.save_for_backward(fx)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _first_order(ctx, g), None, None


def _first_order(ctx: Any, g: Tensor) -> Tensor:
    """The adjoint of g, guarded: under create_graph the first derivative is right, and a second one would not be."""
    v: Tensor = ctx.solve(g)
    return _FirstOrderOnly.apply(v, g, *ctx.saved_tensors) if torch.is_grad_enabled() else v


class _FirstOrderOnly(torch.autograd.Function):
    """Identity whose own backward raises.  Everything v depends on is an input, so no second derivative gets by."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, *depends_on: Tensor) -> Tensor:
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        raise RuntimeError(
            "ImplicitAdjoint: expected derivatives up to the adjoint's order, got a request for the next one. "
            "Pass adjoint=ImplicitAdjoint(order=2) for exact second derivatives, or Unrolled() for any order."
        )


def _second_order(f: RowMap, fx: Tensor, x: Tensor, backward: _BackwardSolve) -> Tensor:
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
    def forward(ctx: Any, fx: Tensor, x: Tensor, backward: _BackwardSolve) -> tuple[Tensor, Tensor]:
        ctx.solve = backward
        ctx.save_for_backward(fx)
        return x.detach(), torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, from_f: Tensor, first_order_part: Tensor) -> tuple[Tensor | None, ...]:
        g = from_f + first_order_part
        # A thousand roundings: both sides are the same product, summed by f's graph in an order of its own.
        rounding = 1e3 * torch.finfo(g.dtype).eps * first_order_part.abs().amax(dim=1)
        if bool((g.abs().amax(dim=1) <= rounding).all()):
            return None, None, None
        return _first_order(ctx, g), None, None


class _NewtonStep(torch.autograd.Function):
    """x + S(f(x) − x), where f(x) = x: the value is x, backward is the adjoint solve, differentiable."""

    @staticmethod
    def forward(
        ctx: Any, fx: Tensor, point: Tensor, first_order_part: Tensor, x: Tensor, backward: _BackwardSolve
    ) -> Tensor:
        ctx.solve = backward
        ctx.save_for_backward(fx, point)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        v = ctx.solve(g)
        fx, point = ctx.saved_tensors
        Jtv = vjp(fx, point, v, create_graph=torch.is_grad_enabled())
        if torch.is_grad_enabled():
            v = v + _TransposedSolve.apply(g + Jtv - v, fx, ctx.solve)
        return v, None, -Jtv.detach(), None, None


class _TransposedSolve(torch.autograd.Function):
    """r ↦ (I − Jᵀ)⁻¹ r at r = 0, the derivative of v = g + Jᵀv; first order only."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, fx: Tensor, backward: _BackwardSolve) -> Tensor:
        ctx.solve = backward
        ctx.save_for_backward(fx)
        return torch.zeros_like(r)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        w = ctx.solve.transposed(h)
        if torch.is_grad_enabled():
            w = _FirstOrderOnly.apply(w, h, *ctx.saved_tensors)
        return w, None, None
