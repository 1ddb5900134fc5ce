"""The exact gradient, by the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..equations.function import RowsOf
from ..equations.linearize import linearize
from ..equations.map import RowMap
from ..loop.iterate import iterate
from ..loop.outcome import Outcome
from ..solution import BackwardReport, OnFailure
from ..solvers import Auto, Solver
from .backward import BackwardSolve, attached, depends_on_weights
from .base import Adjoint
from .second_order import second_order


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
        self, f: RowMap, x0: Tensor | None, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> tuple[Tensor, Outcome]:
        # A compiled loop makes no graph in any case.
        swept = None if trace else solver.first_stage(f, x0)
        if swept is not None and not swept.unsolved:
            outcome = Outcome.of(swept, solver)
        else:
            with torch.no_grad():
                outcome = iterate(f, x0, solver, trace=trace, swept=swept)
        if not torch.is_grad_enabled():
            return outcome.x, outcome
        at = linearize(f, outcome.x, outcome.slope)
        if at is None or not depends_on_weights(at):
            return outcome.x, outcome
        if isinstance(f, RowsOf):  # whose evaluation shows whether samples influence one another
            outcome = replace(outcome, fx=at.value.detach())
        backward = BackwardSolve(f, at, self.solver, on_failure, trace, report)
        if self.order == 1:
            return attached(at, outcome.x, backward), outcome
        return second_order(f, at.value, outcome.x, backward), outcome
