"""The adjoint solve v = g + Jᵀv, and the solution with its first derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._checks import wrong
from .._context import has_tangent
from ..equilibrium import Linearization, RowMap
from ..iterate import iterate
from ..solution import BackwardReport, OnFailure, announce
from ..solvers import Solver
from .cotangents import each, many
from .guard import FirstOrderOnly


@dataclass(frozen=True)
class BackwardSolve:
    """v = g + Jᵀv at one solution, and its report."""

    at: Linearization
    solver: Solver
    on_failure: OnFailure
    trace: bool
    report: BackwardReport
    # Where to look for v: the first term of its Neumann series, unless something better is known.
    start: Callable[[Tensor], Tensor] = lambda g: g
    # Of a coupled batch, which is solved as one row.
    samples: int | None = None

    def __call__(self, g: Tensor) -> Tensor:
        return self._solve("backward", g, self.at.adjoint_map, self.report)

    def transposed(self, h: Tensor) -> Tensor:
        """w = h + J w, the solve that forward mode needs, and a second derivative."""
        return self._solve("tangent", h, self.at.tangent_map, BackwardReport())

    def _solve(self, which: str, g: Tensor, problem: Callable[[Tensor], RowMap], report: BackwardReport) -> Tensor:
        if many(g):
            return each(partial(self._solve, which, problem=problem, report=report), g)
        if has_tangent(g):
            raise wrong(
                which, "cotangents without tangents for a solution found outside of forward mode", "dual numbers",
                "Make the solve inside torch.autograd.forward_ad.dual_level() too.",
            )  # fmt: skip
        with torch.no_grad():
            unit, scale = scaled(g)
            outcome = iterate(problem(unit), self.start(unit), self.solver, trace=self.trace)
            if self.samples is not None:
                outcome = outcome.of_each(self.samples)
            report.residual, report.steps = outcome.residual, outcome.steps
            report.converged, report.trace = outcome.converged, outcome.trace
            announce(
                f"{which}({type(self.solver).__name__})", "backward", outcome.residual, outcome.steps,
                outcome.converged, outcome.all_converged, outcome.rtol, self.solver.max_steps, self.on_failure,
            )  # fmt: skip
            return outcome.x * scale


def scaled(g: Tensor) -> tuple[Tensor, Tensor]:
    """g with largest entries of 1, and their size: squared norms of 1e-23 and less would underflow in float32."""
    scale = torch.linalg.vector_norm(g, ord=float("inf"), dim=1, keepdim=True).clamp_(min=torch.finfo(g.dtype).tiny)
    return g / scale, scale


class Attach(torch.autograd.Function):
    """The solution as a function of f(x*): backward turns the cotangent g into v = g + Jᵀv and sends it into f."""

    @staticmethod
    def forward(ctx: Any, fx: Tensor, x: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = backward
        ctx.save_for_backward(fx)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return first_order(ctx, g), None, None


def first_order(ctx: Any, g: Tensor) -> Tensor:
    """The adjoint of g, guarded: under create_graph the first derivative is right, and a second one would not be."""
    v: Tensor = ctx.solve(g)
    return FirstOrderOnly.apply(v, g, *ctx.saved_tensors) if torch.is_grad_enabled() else v
