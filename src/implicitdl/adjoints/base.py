"""Adjoint: the settings of a way to differentiate, and its one method."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ..equations.map import RowMap
from ..loop.outcome import Outcome
from ..solution import BackwardReport, OnFailure
from ..solvers import Solver


class Adjoint(ABC):
    """From the map and a start to the solution with its gradient; `fixed_point` checks and reports around it."""

    @abstractmethod
    def solve(
        self, f: RowMap, x0: Tensor | None, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> tuple[Tensor, Outcome]:
        """The solution, (batch, d), with its graph, and the figures of the forward solve."""
