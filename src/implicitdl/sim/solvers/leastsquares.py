"""LeastSquareSolver: the unconstrained fit, which knows nothing of well-posedness."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..certificate import RowSolution, dual_gap
from ..problem import RowProblem
from .base_solver import RowSolver


@dataclass(frozen=True, kw_only=True)
class LeastSquareSolver(RowSolver):
    """The A, B, C, D of least squares, of smallest norm where there are many; no penalty and no bound on ‖A‖∞.

    For comparison: the equilibrium of what it returns need not exist.  All samples are in memory at once, in float64,
    on the CPU.

    Arguments:
        regen_states, tol: as for `RowSolver`.

    Warns:
        SIMWarning: ‖A‖∞ is above κ, so that nothing makes the model well posed.

    Example:
        >>> import torch
        >>> from implicitdl.sim.solvers import LeastSquareSolver
        >>> X, U = torch.rand(2, 40), torch.rand(3, 40)
        >>> A, B, C, D = LeastSquareSolver().solve(X, U, 0.5 * X, X[:1])
        >>> A.diagonal()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    @property
    def bounded(self) -> bool:
        return False

    def solve_rows(self, problem: RowProblem, start: RowSolution | None = None) -> RowSolution:
        data = torch.cat([problem.X, problem.U]).t().double().cpu()
        # The driver that finds the solution of smallest norm, for data of any rank, is on the CPU.
        w = torch.linalg.lstsq(data, problem.T.t().double().cpu(), driver="gelsd").solution.t().to(problem.T.device)
        report, _ = dual_gap(problem, w, self.tol)
        return RowSolution(w[:, : problem.n], w[:, problem.n :], report)
