"""Adjoint: the settings of a way to differentiate, and its one method."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ..equations.map import Map
from ..loop.iterate import SolveResult
from ..solution import BackwardReport, OnFailure
from ..solvers import Solver


class Adjoint(ABC):
    """From the map and a start to the solution with its gradient; `fixed_point` checks and reports around it."""

    @abstractmethod
    def solve(
        self, f: Map, x0: Tensor | None, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> SolveResult:
        """The solution, (batch, d), with its graph, and the figures of the forward solve.

        Arguments:
            f: the map.
            x0: (batch, d) where to start; None for f(0).
            solver: solves x = f(x).
            on_failure: what a miss of the backward solve causes.
            trace: keep the residual of every evaluation.
            report: to be filled when backward runs.
        """
