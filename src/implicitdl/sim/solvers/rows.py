"""RowSolver: a solver that solves rows, each with its certificate, in batches and among processes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._internal.errors import fraction, non_negative, real, settle, wrong
from ..problem import RowProblem
from ..solution import RowSolution, SIMSolution
from .base import (
    BaseSolver,
    ModelConfig,
    Progress,
    Solved,
    centred,
    checked,
    regenerated,
    warn_missed,
    warn_unbounded,
    with_intercepts,
)
from .distributed import Collect, in_batches, same_states

# Few enough that the iterates of all are small beside the Gram matrix, and progress is seen.
_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class RowSolver(BaseSolver):
    """Solvers that solve rows: those of (A, B) with ‖a‖₁ ≤ κ, and those of (C, D) without a bound.

    Arguments:
        regen_states: fit C and D to the equilibrium states of the A and B found, not to the teacher's.
        tol: the relative duality gap asked for.  Rows that miss it are warned about, and kept.
    """

    regen_states: bool = False
    tol: float = 1e-6

    def __post_init__(self) -> None:
        settle(self, fraction, "tol")

    @property
    def rows_at_once(self) -> int:
        """Most rows that `solve_rows` is given."""
        return _ROWS

    @property
    def bounded(self) -> bool:
        """Whether the rows of A are held to ‖a‖₁ ≤ κ."""
        return True

    def penalties(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(λ, μ) of the rows of (A, B), and of those of (C, D)."""
        return (0.0, 0.0), (0.0, 0.0)

    @abstractmethod
    def solve_rows(self, problem: RowProblem, start: RowSolution | None = None) -> RowSolution:
        """The rows of one problem, with their report.

        Arguments:
            problem: the data, λ and κ.
            start: a solution near by, or None.
        """

    def solve_hidden(self, problem: RowProblem, start: RowSolution | None = None) -> RowSolution:
        """`solve_rows` for rows of (A, B), where the solver treats them differently."""
        return self.solve_rows(problem, start)

    def _hidden(self, problem: RowProblem, start: RowSolution | None, moved: Callable[[int], None]) -> Collect:
        return in_batches(self.solve_hidden, problem, start, self.rows_at_once, moved)

    def path(self, problem: RowProblem, lambdas: Iterable[float]) -> Iterator[RowSolution]:
        """Solutions for one λ after another, each started from the one before; give large λ first."""
        start = None
        for lam in lambdas:
            start = self.solve_rows(problem.other(lam=lam), start)
            yield start

    def solve(self, X: Tensor, U: Tensor, Z: Tensor, Y: Tensor, model_config: ModelConfig | None = None) -> Solved:
        X, U, Z, Y = (M if isinstance(M, Tensor) else torch.as_tensor(M, device="cpu") for M in (X, U, Z, Y))
        A, B, C, D = self.fit(X, U, Z, Y, model_config)
        return A, B, C, D

    def fit(
        self,
        X: Tensor,
        U: Tensor,
        Z: Tensor,
        Y: Tensor,
        model_config: ModelConfig | None = None,
        *,
        intercept: bool = False,
        start: SIMSolution | None = None,
        progress: Progress | None = None,
    ) -> SIMSolution:
        config = checked(type(self).__name__, (X, U, Z, Y), model_config)
        same_states(type(self).__name__, (X, U, Z, Y))
        (x, u, z, y), means = centred((X, U, Z, Y), intercept)
        count = _Counter(len(Z) + len(Y), progress)
        (lam, ridge), (lam_y, ridge_y) = self.penalties()
        kappa = config["kappa"] if self.bounded else math.inf
        problem = RowProblem(X=x, U=u, T=z, lam=lam, ridge=ridge, kappa=kappa)
        collect = self._hidden(problem, _rows(start, "A", "B", "hidden"), count)
        x_mean = None if means is None else means[0]
        if self.regen_states:
            hidden = collect()
            b_x = None if means is None else means[2] - hidden.a @ means[0] - hidden.b @ means[1]
            states = (regenerated(hidden.a, hidden.b, b_x, U, config),)
            (x,), shifted = centred(states, intercept)
            x_mean = None if shifted is None else shifted[0]
            problem = RowProblem(X=x, U=u, T=y, lam=lam_y, ridge=ridge_y)
        else:
            problem = problem.other(y, lam=lam_y, ridge=ridge_y, kappa=math.inf)
        start_rows = _rows(start, "C", "D", "output")
        output = in_batches(self.solve_rows, problem, start_rows, self.rows_at_once, count)()
        hidden = collect()
        for name, part in (("(A, B)", hidden), ("(C, D)", output)):
            warn_missed(type(self).__name__, name, part.report, self.tol)
        if not self.bounded:
            warn_unbounded(type(self).__name__, hidden.report, config["kappa"])
        found = SIMSolution(hidden.a, hidden.b, output.a, output.b, hidden.report, output.report)
        return with_intercepts(found, means, x_mean)


@dataclass(frozen=True, kw_only=True)
class PenalisedSolver(RowSolver):
    """Row solvers of

        min ½‖z − Xᵀa − Uᵀb‖² + λ(‖a‖₁ + ‖b‖₁)   subject to  ‖a‖₁ ≤ κ

    Arguments:
        lambda_z: λ of the rows of (A, B).
        lambda_y: λ of the rows of (C, D).
        elastic_net: penalise with λ(l1_ratio ‖w‖₁ + ½(1 − l1_ratio)‖w‖²) instead.
        l1_ratio: the share of the ℓ1 norm in an elastic net, in (0, 1].
        regen_states, tol: as for `RowSolver`.
    """

    lambda_z: float = 1e-6
    lambda_y: float = 1e-6
    elastic_net: bool = False
    l1_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, non_negative, "lambda_z", "lambda_y")
        settle(self, _share, "l1_ratio")

    def penalties(self) -> tuple[tuple[float, float], tuple[float, float]]:
        share = self.l1_ratio if self.elastic_net else 1.0
        z, y = self.lambda_z, self.lambda_y
        return (share * z, (1 - share) * z), (share * y, (1 - share) * y)


def _share(who: str, name: str, value: object) -> float:
    if not 0.0 < (number := real(value)) <= 1.0:
        raise wrong(who, f"0 < {name} ≤ 1", repr(value))
    return number


class _Counter:
    """Adds up the rows that are done, for whoever watches."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, rows: int) -> None:
        self._done = min(self._done + rows, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)


def _rows(start: SIMSolution | None, a: str, b: str, report: str) -> RowSolution | None:
    return None if start is None else RowSolution(getattr(start, a), getattr(start, b), getattr(start, report))
