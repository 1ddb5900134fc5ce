"""The adjoint solve v = g + Jᵀv, and the solution with its first derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._internal.context import has_tangent, without_grad
from .._internal.errors import wrong
from ..equations.function import OneRow, RowsOf
from ..equations.map import Linearization, RowMap
from ..loop.announce import announce
from ..loop.coupling import after, announce_coupling, are_coupled
from ..loop.iterate import iterate
from ..loop.outcome import Outcome
from ..solution import BackwardReport, OnFailure
from ..solvers import Solver
from ..solvers.base import precise
from .cotangents import each, many
from .guard import FirstOrderOnly


@dataclass(frozen=True)
class BackwardSolve:
    """v = g + Jᵀv at one solution, and its report."""

    f: RowMap
    at: Linearization
    solver: Solver
    on_failure: OnFailure
    trace: bool
    report: BackwardReport
    # Where to look for v, if anywhere but at the first term of its Neumann series.
    start: Callable[[Tensor], Tensor] | None = None

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
        who = f"{which}({type(self.solver).__name__})"
        with without_grad():
            # The compiled loop has units of its own.
            scale, start = None, self.start
            swept = None if self.trace or start else self.solver.first_stage(problem(g), None)
            if swept is not None and not swept.unsolved:
                outcome = Outcome.of(swept, self.solver)
            else:
                unit, scale = scaled(g)
                swept = None if swept is None else swept._replace(x=swept.x / scale)
                outcome = iterate(problem(unit), self._start(unit), self.solver, trace=self.trace, swept=swept)
            v = outcome.x if scale is None else outcome.x * scale
            if isinstance(self.f, OneRow):
                outcome = outcome.of_each(self.f.samples)
            elif isinstance(self.f, RowsOf) and not self.f.independent and len(g) > 1:
                assert scale is not None  # the compiled loops serve maps of the library's own
                # Cotangents of unlike sizes, each solved in units of its own, are apart from the beginning.
                outcome = replace(outcome, apart=True)
                if are_coupled(problem(g), v, outcome, self.solver.atol / outcome.rtol * scale.squeeze(1)):
                    announce_coupling(who)
                    v, outcome = self._as_one(problem, g, v, outcome)
            report.figures = outcome.figures
            announce(who, "backward", outcome, self.solver, self.on_failure)
            return v

    def _as_one(
        self, problem: Callable[[Tensor], RowMap], g: Tensor, v: Tensor, alone: Outcome
    ) -> tuple[Tensor, Outcome]:
        """v for the whole batch as one row, in units of the largest cotangent, from what its samples found alone."""
        unit, scale = scaled(g.reshape(1, -1))
        one = OneRow(problem(unit.view_as(g)), len(g))
        outcome = iterate(one, one.together(v) / scale, self.solver, trace=self.trace)
        return one.apart(outcome.x * scale), after(alone, outcome.of_each(one.samples))

    def _start(self, unit: Tensor) -> Tensor:
        """The first term of the Neumann series, which a root problem does not have."""
        if self.start is not None:
            return self.start(unit)
        return torch.zeros_like(unit) if getattr(self.at, "root", False) else unit


def scaled(g: Tensor) -> tuple[Tensor, Tensor]:
    """g with largest entries from 1 to 2, and their unit: squared norms of 1e-23 and less would underflow in float32.

    Powers of two, so that what was found in other units stays the same to the last digit.
    """
    largest = torch.linalg.vector_norm(g, ord=float("inf"), dim=1, keepdim=True).to(precise(g.dtype))
    exponent = torch.frexp(largest).exponent - 1
    scale = torch.ldexp(torch.ones_like(largest), exponent).to(g.dtype)
    return g / scale, scale


def depends_on_weights(at: Linearization) -> bool:
    """Whether there is anybody to send a gradient to."""
    weights = getattr(at, "weights", None)
    return at.value.requires_grad if weights is None else any(weight.requires_grad for weight in weights)


def attached(at: Linearization, x: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
    """The solution with its first derivative, by the graph of f(x*) or by what stands for it in closed form."""
    weights = getattr(at, "weights", None)
    solution: Tensor = (
        Attach.apply(at.value, x, backward) if weights is None else AttachInClosedForm.apply(at, x, backward, *weights)
    )
    return solution


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


class AttachInClosedForm(torch.autograd.Function):
    """The same where f knows the cotangents of its weights without a graph."""

    @staticmethod
    def forward(ctx: Any, at: Any, x: Tensor, backward: Callable[[Tensor], Tensor], *weights: Tensor) -> Tensor:
        ctx.at, ctx.solve = at, backward
        ctx.save_for_backward(*weights, x)
        return x.clone()  # what the user does to it in place must not reach the x that backward reads

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        *_, x = ctx.saved_tensors
        return None, None, None, *ctx.at.pull(x, first_order(ctx, g))


def first_order(ctx: Any, g: Tensor) -> Tensor:
    """The adjoint of g, guarded: under create_graph the first derivative is right, and a second one would not be."""
    v: Tensor = ctx.solve(g)
    return FirstOrderOnly.apply(v, g, *ctx.saved_tensors) if torch.is_grad_enabled() else v
