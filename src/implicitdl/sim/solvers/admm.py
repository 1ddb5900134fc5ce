"""ADMMSolver, the default: ADMM where it is quick, an active set to the end, a certificate for every row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._internal.errors import positive, positive_int, settle
from ..certificate import cast_inside, certify
from ..problem import RowProblem
from ..solution import RowReport, RowSolution
from .active_set import Rows, active_set
from .elimination import eliminated
from .rows import PenalisedSolver

# b has kept its signs in this share of its entries when λ is small enough to eliminate b.
_KEPT = 0.9
# From one λ to the next on the way down from the λ whose solution is 0, at least.
_DECREASE = 0.1
# A second round takes out the rounding of the Gram matrix.  More are needed where ε slows Newton down, on data whose
# smallest eigenvalues are of its size.
_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class ADMMSolver(PenalisedSolver):
    """The default solver: exact to rounding, and certified, in about the time of a few factorisations a row.

    Where λ is so small that it turns few signs of b, b is eliminated, and ADMM finds a from the small and
    well-conditioned problem that is left.  Elsewhere, and for rows with no such start, λ comes down from the value
    whose solution is 0.  Either way an active set goes to the minimiser, and the dual point of `certify` says how far
    from it a row has remained.

    Arguments:
        lambda_z, lambda_y, elastic_net, l1_ratio, regen_states, tol: as for `PenalisedSolver`.
        num_epoch_ab: ADMM sweeps for the rows of (A, B).
        num_epoch_cd: ADMM sweeps for the rows of (C, D).
        rho_ab: ρ to begin with for the rows of (A, B); every row's is balanced from there.  None is the mean
            eigenvalue of what is left after the elimination.
        rho_cd: likewise for (C, D).
        max_steps: most active-set steps of a row at one λ.
        batch_feature_size: most rows solved together.

    Memory grows as (n + p)², three Gram-sized matrices in float64, and with batch_feature_size, not with the samples:
    they are passed over a few thousand at a time.

    Source: Boyd et al., Distributed optimization and statistical learning via ADMM (2011); Tsai et al., State-driven
        implicit modeling, arXiv:2209.09389, for the problem.

    Example:
        >>> import torch
        >>> from implicitdl.sim.solvers import ADMMSolver
        >>> U = torch.rand(4, 50, dtype=torch.float64)
        >>> Z = torch.tensor([[1.0, -1, 0, 0], [0, 1, 1, -1]], dtype=torch.float64) @ U
        >>> X, Y = Z.relu(), Z[:1].relu() - Z[1:].relu()
        >>> found = ADMMSolver(lambda_z=1e-3, lambda_y=1e-3).fit(X, U, Z, Y, {"kappa": 0.9})
        >>> bool((found.hidden.gap <= 1e-6 * found.hidden.objective).all())
        True
        >>> bool((found.A.abs().sum(dim=1) <= 0.9).all())
        True
    """

    num_epoch_ab: int = 50
    num_epoch_cd: int = 50
    rho_ab: float | None = None
    rho_cd: float | None = None
    max_steps: int = 1000
    batch_feature_size: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive_int, "num_epoch_ab", "num_epoch_cd", "max_steps", "batch_feature_size")
        settle(self, positive, "rho_ab", "rho_cd")

    @property
    def rows_at_once(self) -> int:
        return self.batch_feature_size

    def solve_rows(self, problem: RowProblem, start: RowSolution | None = None) -> RowSolution:
        w = self._descended(problem) if start is None else start.w
        w, report = self._finished(problem, w)
        return RowSolution(w[:, : problem.n], w[:, problem.n :], report)

    def _descended(self, problem: RowProblem) -> Tensor:
        """Near the minimiser, by elimination or from w = 0."""
        bounded = problem.kappa < math.inf
        sweeps, rho = (self.num_epoch_ab, self.rho_ab) if bounded else (self.num_epoch_cd, self.rho_cd)
        w, kept = eliminated(problem, rho, sweeps)
        if len(rest := torch.nonzero(kept < _KEPT)[:, 0]) > 0:
            w[rest] = self._down(problem.take(rest))
        return w

    def _down(self, problem: RowProblem) -> Tensor:
        """Along decreasing λ from w = 0: every problem is a few steps from the one before."""
        largest = float(problem.lambda_max().max())
        w = torch.zeros_like(problem.correlation)
        if not 0 < problem.lam < largest:
            return w
        count = math.ceil(math.log(problem.lam / largest) / math.log(_DECREASE))
        rows = Rows.at(w, problem.correlation.clone(), problem.n, problem.kappa)
        for k in range(1, count):
            lam = largest * (problem.lam / largest) ** (k / count)
            active_set(problem.faces, rows, problem.n, lam, problem.kappa, self.max_steps)
        return rows.w

    def _finished(self, problem: RowProblem, w: Tensor) -> tuple[Tensor, RowReport]:
        """The active set at λ itself, from the gradient of the data, until every row has its certificate."""
        w, report, g = self._certified(problem, w, move=False)
        for _ in range(_ROUNDS):
            if len(open_ := torch.nonzero(~report.converged)[:, 0]) == 0:
                break
            part = problem.take(open_)
            rows = Rows.at(w[open_], g[open_], problem.n, problem.kappa)
            active_set(part.faces, rows, problem.n, problem.lam, problem.kappa, self.max_steps)
            moved, moved_report, moved_g = self._certified(part, rows.w)
            better = moved_report.gap < report.gap[open_]
            chosen = open_[better]
            w[chosen], g[chosen] = moved[better], moved_g[better]
            report.put(chosen, moved_report.take(better))
            if not bool(better.any()):
                break
        return w, report

    def _certified(self, problem: RowProblem, w: Tensor, *, move: bool = True) -> tuple[Tensor, RowReport, Tensor]:
        a = cast_inside(w[:, : problem.n], w.dtype, problem.kappa)
        w = torch.cat([a, w[:, problem.n :]], dim=1)
        report, g = certify(problem, w, self.tol, move=move)
        return w, report, g
