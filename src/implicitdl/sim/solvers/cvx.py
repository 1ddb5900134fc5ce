"""CVXSolver: the same rows by a general convex solver, for comparison and for exact matching."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._internal.errors import extra, non_negative, positive_int, settle, wrong
from ..certificate import RowReport, RowSolution, cast_inside, dual_gap
from ..problem import RowProblem
from .base_solver import PenalisedSolver, SIMWarning

_SOLVED = ("optimal", "optimal_inaccurate")


@dataclass(frozen=True, kw_only=True)
class CVXSolver(PenalisedSolver):
    """Rows by CVXPY: slow and independent of everything else here, hence the oracle.

    Arguments:
        solver: any solver that CVXPY has installed, by its name there.
        options: what to hand on to it, such as ``{"tol_gap_rel": 1e-10}`` for Clarabel.
        regularized: fit with a penalty; False asks for an exact match instead,
            min ‖a‖₁ + ‖b‖₁  subject to  Xᵀa + Uᵀb = z,  ‖a‖₁ ≤ κ, a linear program.
        well_pose: hold the rows of A to ‖a‖₁ ≤ κ.
        num_row: rows of one CVXPY problem.
        num_processes: CVXPY problems at a time, in threads.
        batch_size: rows between two reports of progress.
        zero: entries at most so large become 0, which interior-point methods never reach.
        verbose: let the solver print.
        lambda_z, lambda_y, elastic_net, l1_ratio, regen_states, tol: as for `PenalisedSolver`.

    Raises:
        ArgumentError: a solver that is not installed.
        MissingExtraError: CVXPY is not installed.

    Warns:
        SIMWarning: a row that the solver called infeasible or failed on; it is returned as zeros.  With
            ``regularized=False`` that is a row that no (a, b) matches with ‖a‖₁ ≤ κ.

    Source: Diamond & Boyd, CVXPY (2016); Goulart & Chen, Clarabel (2024).

    Example:
        >>> import torch
        >>> from implicitdl.sim.solvers import CVXSolver
        >>> U = torch.rand(3, 30, dtype=torch.float64)
        >>> X = 0.5 * U[:2]
        >>> A, B, C, D = CVXSolver(lambda_z=1e-2, lambda_y=1e-2).solve(X, U, X, X[:1])
        >>> bool((A.abs().sum(dim=1) <= 0.99).all())
        True
    """

    solver: str = "CLARABEL"
    options: Mapping[str, Any] = field(default_factory=dict)
    regularized: bool = True
    well_pose: bool = True
    num_row: int = 1
    num_processes: int = 1
    batch_size: int = 32
    zero: float = 1e-7
    verbose: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive_int, "num_row", "num_processes", "batch_size")
        settle(self, non_negative, "zero")
        if self.elastic_net and not self.regularized:
            raise wrong("CVXSolver", "elastic_net=True with regularized=True", "regularized=False", "Drop one of them.")
        if self.solver not in (known := extra("cvxpy", "sim").installed_solvers()):
            raise wrong("CVXSolver", f"solver to be one of {', '.join(known)}", repr(self.solver), "Install it first.")

    @property
    def rows_at_once(self) -> int:
        return self.batch_size

    @property
    def bounded(self) -> bool:
        return self.well_pose

    def solve_rows(self, problem: RowProblem, start: RowSolution | None = None) -> RowSolution:
        groups = torch.arange(problem.shape[0], device=problem.T.device).split(self.num_row)
        with ThreadPoolExecutor(self.num_processes) as pool:
            found = list(pool.map(lambda rows: self._group(problem[rows]), groups))
        w, theta = (torch.cat([getattr(part, name) for part in found]) for name in ("w", "theta"))
        if failed := [part.status for part in found if part.status != "optimal"]:
            warnings.warn(
                f"CVXSolver: {len(failed)} of {len(found)} problems are not optimal, {self.solver} says: "
                f"{', '.join(sorted(set(failed)))}. A row without a solution is zero.",
                SIMWarning,
                stacklevel=5,
            )
        report = dual_gap(problem, w, self.tol)[0] if self.regularized else _matched(problem, w, theta, self.tol)
        return RowSolution(w[:, : problem.n], w[:, problem.n :], report)

    def _group(self, problem: RowProblem) -> _Found:
        cp = extra("cvxpy", "sim")
        phi = torch.cat([part for part, _ in problem.chunks()], dim=1).cpu().numpy()
        T = problem.T.double().cpu().numpy()
        a, b = cp.Variable((len(T), problem.n)), cp.Variable((len(T), len(phi) - problem.n))
        w = cp.hstack([a, b])
        constraints = [cp.norm(a, 1, axis=1) <= problem.kappa] if problem.kappa < math.inf else []
        size = cp.sum(cp.abs(w))
        if self.regularized:
            objective = 0.5 * cp.sum_squares(T - w @ phi) + problem.lam * size
            if problem.ridge > 0:  # a term of weight 0 has variables that nothing determines, which cost digits
                objective += 0.5 * problem.ridge * cp.sum_squares(w)
        else:
            objective, constraints = size, [w @ phi == T, *constraints]
        task = cp.Problem(cp.Minimize(objective), constraints)
        try:
            task.solve(solver=self.solver, verbose=self.verbose, **self.options)
        except cp.error.SolverError as error:
            return _Found(problem.T.new_zeros(problem.shape), torch.zeros_like(problem.T), str(error)).to(problem)
        if task.status not in _SOLVED:
            return _Found(problem.T.new_zeros(problem.shape), torch.zeros_like(problem.T), task.status).to(problem)
        value = torch.from_numpy(w.value)
        value = value.masked_fill(value.abs() <= self.zero, 0.0)
        value[:, : problem.n] = cast_inside(value[:, : problem.n], torch.float64, problem.kappa)
        theta = torch.zeros_like(problem.T) if self.regularized else torch.from_numpy(-constraints[0].dual_value)
        return _Found(value, theta, task.status).to(problem)


@dataclass(frozen=True)
class _Found:
    """(rows, d), the dual point (rows, samples) of an exact match, and CVXPY's status."""

    w: Tensor
    theta: Tensor
    status: str

    def to(self, problem: RowProblem) -> _Found:
        return _Found(
            self.w.to(problem.T.device, torch.float64), self.theta.to(problem.T.device, torch.float64), self.status
        )


def _matched(problem: RowProblem, w: Tensor, theta: Tensor, tol: float) -> RowReport:
    """The report of exact matching: ‖w‖₁, and its distance from max tᵀθ − κ(‖Xθ‖∞ − 1)₊ over ‖Uθ‖∞ ≤ 1.

    A row that misses a sample by more than the share tol of the largest has no objective that compares: it is ∞.
    """
    size, n = w.abs().sum(dim=1), problem.n
    off = (problem.T.double() - problem.predicted(w)).abs().amax(dim=1)
    size = torch.where(off <= tol * problem.T.double().abs().amax(dim=1), size, math.inf)
    image = problem.image(theta).abs()
    free = image[:, n:] if problem.kappa < math.inf else image
    theta = theta / free.amax(dim=1, keepdim=True).clamp(min=1)
    bound = (theta * problem.T).sum(dim=1)
    if problem.kappa < math.inf:
        bound -= problem.kappa * (problem.image(theta)[:, :n].abs().amax(dim=1) - 1).clamp(min=0)
    gap = (size - bound.clamp(min=0)).clamp(min=0)
    norm, support = w[:, :n].abs().sum(dim=1), (w != 0).sum(dim=1)
    return RowReport(size, gap, norm, support, torch.zeros_like(gap), gap < tol * size)
