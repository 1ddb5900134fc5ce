"""ADMMSolver, the default: an active set to the end, ADMM sweeps as a start, a certificate for every row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._internal.errors import positive, positive_int, settle
from ...constraints.norm import project_l1
from ..active_set import ActiveSets, active_set
from ..certificate import RowReport, RowSolution, cast_inside, dual_gap
from ..problem import RowProblem
from .base_solver import PenalisedSolver

# b has kept its signs in this share of its entries when λ is small enough to eliminate b.
_KEPT = 0.9
# From one λ to the next on the way down from the λ whose solution is 0, at least.
_DECREASE = 0.1
# A second round takes out the rounding of the Gram matrix.  More are needed where ε slows Newton down, on data whose
# smallest eigenvalues are of its size.
_ROUNDS = 20
# Of the Gram matrix, in trace: what is left for a below this share is rounding.
_NOTHING = 1e-12
# Over-relaxation between 1.5 and 1.8 is customary (Boyd et al. 2011, §3.4.3).
_RELAXATION = 1.6
# Sweeps between two balancings of ρ; the residuals need a few to settle.
_BALANCE = 10


@dataclass(frozen=True, kw_only=True)
class ADMMSolver(PenalisedSolver):
    """The default: an active-set solver with ADMM sweeps as a start, exact to rounding and certified.

    The start: where λ is so small that it turns few signs of b, b is eliminated, and ADMM finds a from the small and
    well-conditioned problem that is left.  Elsewhere, and for rows with no such start, λ comes down from the value
    whose solution is 0.  Then the active set goes to the minimiser, and a dual point says how far from it a row has
    remained.  A row takes about the time of a few factorisations.

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
        w, report, g = self._certified(problem, self._start(problem) if start is None else start.w, move=False)
        # The active set at λ itself, from the gradient of the data, until every row has its certificate.
        for _ in range(_ROUNDS):
            if len(open_ := torch.nonzero(~report.converged)[:, 0]) == 0:
                break
            part = problem[open_]
            rows = ActiveSets.at(part, w[open_], g[open_])
            active_set(part, rows, self.max_steps)
            new_w, new_report, new_g = self._certified(part, rows.w)
            better = new_report.gap < report.gap[open_]
            improved = open_[better]
            w[improved], g[improved], report[improved] = new_w[better], new_g[better], new_report[better]
            if not bool(better.any()):
                break
        return RowSolution(w[:, : problem.n], w[:, problem.n :], report)

    def _start(self, problem: RowProblem) -> Tensor:
        """Near the minimiser, by elimination or from w = 0."""
        bounded = problem.kappa < math.inf
        sweeps, rho = (self.num_epoch_ab, self.rho_ab) if bounded else (self.num_epoch_cd, self.rho_cd)
        w, kept = _eliminated(problem, rho, sweeps)
        if len(rest := torch.nonzero(kept < _KEPT)[:, 0]) > 0:
            w[rest] = self._down(problem[rest])
        return w

    def _down(self, problem: RowProblem) -> Tensor:
        """Along decreasing λ from w = 0: every problem is a few steps from the one before."""
        largest = float(problem.lambda_max().max())
        w = torch.zeros_like(problem.correlation)
        if not 0 < problem.lam < largest:
            return w
        count = math.ceil(math.log(problem.lam / largest) / math.log(_DECREASE))
        rows = ActiveSets.at(problem, w, problem.correlation.clone())
        for k in range(1, count):
            active_set(problem.replace(lam=largest * (problem.lam / largest) ** (k / count)), rows, self.max_steps)
        return rows.w

    def _certified(self, problem: RowProblem, w: Tensor, *, move: bool = True) -> tuple[Tensor, RowReport, Tensor]:
        a = cast_inside(w[:, : problem.n], w.dtype, problem.kappa)
        w = torch.cat([a, w[:, problem.n :]], dim=1)
        report, g = dual_gap(problem, w, self.tol, move=move)
        return w, report, g


class Elimination:
    """b = G_UU⁻¹(q_U − λσ − G_UX a): the minimiser for a given a, when σ are the signs of b.

    Attributes:
        gram: G_XX − G_XU G_UU⁻¹ G_UX, (n, n), of the problem that is left for a.
    """

    def __init__(self, problem: RowProblem) -> None:
        n, G = problem.n, problem.gram
        self._n, self._cross = n, G[:n, n:]
        # An input that is always zero has a b of zero.
        self._used = G.diagonal()[n:] > problem.ridge
        inputs = G[n:, n:].clone()
        inputs.diagonal().add_(problem.systems.shift)
        self._factor = torch.linalg.cholesky(inputs)
        self._K = torch.cholesky_solve(self._cross.t(), self._factor)
        self.gram = G[:n, :n] - self._cross @ self._K

    def b(self, q: Tensor, a: Tensor) -> Tensor:
        """(rows, p), from q = (q_X, q_U − λσ)."""
        return torch.cholesky_solve((q[:, self._n :] - a @ self._cross).t(), self._factor).t() * self._used

    def q(self, q: Tensor) -> Tensor:
        """(rows, n), the linear term for a: q_X − G_XU G_UU⁻¹(q_U − λσ)."""
        return q[:, : self._n] - q[:, self._n :] @ self._K


def _eliminated(problem: RowProblem, rho: float | None, sweeps: int) -> tuple[Tensor, Tensor]:
    """ADMM on a after the elimination of b, for a λ too small to matter to most signs of b.

    What is left for a has a far better condition than the whole when the inputs are nearly rank-deficient, where
    ADMM on the whole crawls.  The signs of b are looked at again whenever ρ is balanced.

    Returns:
        w, (rows, d), and the share of b's entries that λ did not turn: near 1 where the premise holds, and 0 where the
        inputs explain the states and leave nothing for a.
    """
    n, q = problem.n, problem.correlation
    left = Elimination(problem)
    sign = left.b(q, torch.zeros_like(q[:, :n])).sign()

    def shifted(sign: Tensor) -> Tensor:
        return torch.cat([q[:, :n], q[:, n:] - problem.lam * sign], dim=1)

    def linear(a: Tensor) -> Tensor:
        nonlocal sign
        sign = left.b(shifted(sign), a).sign()
        return left.q(shifted(sign))

    if float(left.gram.trace()) <= _NOTHING * float(problem.gram.trace()):
        return torch.zeros_like(q), torch.zeros_like(q[:, 0])
    a = _sweep(left.gram, linear, torch.zeros_like(q[:, :n]), n, problem.lam, problem.kappa, rho, sweeps)
    b = left.b(shifted(sign), a)
    kept = (b.sign() == left.b(q, a).sign()).double().mean(dim=1)
    return torch.cat([a, b], dim=1), kept


def _sweep(
    gram: Tensor,
    q: Callable[[Tensor], Tensor],
    start: Tensor,
    n: int,
    lam: float,
    kappa: float,
    rho: float | None,
    sweeps: int,
) -> Tensor:
    """ADMM on ½aᵀGa − qᵀa + λ‖a‖₁, the first n entries in the ball of radius κ, for every row.

        x = (G + ρI)⁻¹(q + ρ(a − y)),   a = prox(x + y),   y = y + x − a

    In the eigenbasis of G the inverse is a division, so that every row has a ρ of its own, which is balanced: the
    relative primal and dual residuals are kept about equal.

    Arguments:
        gram: G, (d, d).
        q: a ↦ (rows, d), asked for again whenever ρ is balanced.
        start: a, (rows, d).
        rho: ρ to begin with; None for the mean eigenvalue of G.
        sweeps: how many.

    Returns:
        a, (rows, d).

    Source: Boyd et al., Distributed optimization and statistical learning via ADMM (2011), §6.4 for the lasso and
        §3.4.1 for balancing, with residuals relative as in Wohlberg, arXiv:1704.06209.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    scale = float(values.mean()) or 1.0
    a, y = start, torch.zeros_like(start)
    weight = torch.full_like(a[:, :1], rho or scale)
    for count in range(sweeps):
        if count % _BALANCE == 0:
            linear = q(a)
        x = ((linear + weight * (a - y)) @ vectors / (values + weight)) @ vectors.t()
        relaxed = _RELAXATION * x + (1 - _RELAXATION) * a
        before, a = a, _prox(relaxed + y, lam / weight, n, kappa)
        y = y + relaxed - a
        if count % _BALANCE == _BALANCE - 1:
            primal = _size(x - a) * _size(weight * y)
            dual = _size(weight * (a - before)) * torch.maximum(_size(x), _size(a))
            # A factor of ten at most, and never so small a ρ that x has the rounding of a singular G.
            factor = (primal / dual).sqrt().nan_to_num(1.0).clamp(0.1, 10.0)
            factor = (weight * factor).clamp(min=1e-10 * scale) / weight
            weight, y = weight * factor, y / factor
    return a


def _prox(v: Tensor, threshold: Tensor, n: int, kappa: float) -> Tensor:
    shrunk = v.sign() * (v.abs() - threshold).clamp(min=0)
    return torch.cat([project_l1(shrunk[:, :n], kappa), shrunk[:, n:]], dim=1)


def _size(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)
