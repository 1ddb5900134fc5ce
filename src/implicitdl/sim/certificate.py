"""What is known of the rows that were found: how far each is from its optimum, by a dual point of its residual."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .active_set import ActiveSets, RowRecord, newton
from .problem import ResidualStats, RowProblem

# Corrections of the dual point: the first takes out what a nearly singular system left, the second its own rounding.
_CORRECTIONS = 2
# |u_jᵀθ| below this share of ‖u_j‖‖θ‖ is rounding, which λ = 0 has to call zero.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class RowReport(RowRecord):
    """How well each row was solved; every field is (rows,).

    Attributes:
        objective: the objective at the row returned, from the data.
        gap: objective minus the value of a feasible dual point, ≥ 0: the row is within it of the optimum.
            Infinite where no bound is known.
        norm: ‖a‖₁.
        support: nonzeros of (a, b).
        rounding: what rounding alone can make of the gap, where the residual is nothing else.
        converged: whether gap ≤ tol · objective + rounding, which is relative_gap ≤ tol.
    """

    objective: Tensor
    gap: Tensor
    norm: Tensor
    support: Tensor
    rounding: Tensor
    converged: Tensor

    @property
    def relative_gap(self) -> Tensor:
        """(gap − rounding)₊ / objective; 0 where the gap is rounding alone, and infinite where it is."""
        above = (self.gap - self.rounding).clamp(min=0)
        return torch.where((above > 0) & above.isfinite(), above / self.objective, above)


@dataclass(frozen=True)
class RowSolution(RowRecord):
    """w = (a, b) of every row, (rows, n) and (rows, p), and its report."""

    a: Tensor
    b: Tensor
    report: RowReport

    @property
    def w(self) -> Tensor:
        return torch.cat([self.a, self.b], dim=1)


def dual_gap(problem: RowProblem, w: Tensor, tol: float, *, move: bool = True) -> tuple[RowReport, Tensor]:
    """The report of w with its duality gap, and g = Φθ: minus the gradient of the smooth part there.

    Every θ with ‖Uθ‖∞ ≤ λ bounds the optimum from below by

        tᵀθ − ½‖θ‖² − κ(‖Xθ‖∞ − λ)₊,

    and at the optimum the residual t − Φᵀw attains the bound; with κ = ∞, X has to obey what U does.  A residual that
    is merely close breaks ‖Uθ‖∞ ≤ λ by rounding errors that are large beside a small λ, and shrinking it until it
    obeys would cost all digits.  Optimal signs σ say what Φθ is on the support S of w, so θ is moved there,

        θ − Φ_Sᵀ(Φ_SΦ_Sᵀ)⁻¹(Φ_Sθ − c),   c = (λ + τ)σ on the ball's entries and λσ on the others,

    by a Newton step that leaves w alone, and only what is left is taken out by shrinking.  Both points are feasible;
    the better bound counts.  A ridge μ is Φ and t with √μ I and 0 appended.

    Arguments:
        problem: the rows' problem.
        w: (rows, d), with ‖a‖₁ ≤ κ.
        tol: the relative gap that is asked for; rows that have it already are not worked on.
        move: whether θ may be moved, or only shrunk.

    Returns:
        The report, and g, (rows, d).

    Source: Fenchel duality; κ(‖·‖∞ − λ)₊ is the conjugate of λ‖·‖₁ on the ball of radius κ.
    """
    stats = problem.residual(w)
    objective = problem.objective(w, stats.square)
    # A residual of rounding errors alone, which add up like a random walk: no row comes closer to t.
    size = problem.target_square + problem.gram.trace() * (w * w).sum(dim=1)
    floor = 0.5 * torch.finfo(w.dtype).eps ** 2 * max(problem.T.shape[1], w.shape[1]) * size
    bound = _dual(problem, stats, w)
    open_ = torch.nonzero(objective - bound > tol * objective + floor)[:, 0]
    if move and len(open_) > 0:
        corrected = _corrected(problem[open_], w[open_], stats.gradient[open_])
        bound[open_] = torch.maximum(bound[open_], corrected)
    gap = (objective - bound).clamp(min=0)
    report = RowReport(
        objective=objective,
        gap=gap,
        norm=w[:, : problem.n].abs().sum(dim=1),
        support=(w != 0).sum(dim=1),
        rounding=floor,
        converged=gap <= tol * objective + floor,
    )
    return report, stats.gradient


def _corrected(problem: RowProblem, w: Tensor, g: Tensor) -> Tensor:
    """The dual value of θ after Newton steps on the face of w and of what violates its bound, made in θ alone."""
    rows = ActiveSets.at(problem, w, g)
    _, tau = newton(problem, rows)
    bound = torch.full_like(w, problem.lam)
    bound[:, : problem.n] += tau.clamp(min=0).unsqueeze(1)
    rows.sign = torch.where((w == 0) & (g.abs() > bound), g.sign(), rows.sign)
    correction = torch.zeros_like(w)
    for _ in range(_CORRECTIONS):
        correction += newton(problem, rows)[0]
        stats = problem.residual(w, correction)
        rows.g = stats.gradient
    return _dual(problem, stats, w)


def _dual(problem: RowProblem, stats: ResidualStats, w: Tensor) -> Tensor:
    """The largest value of the dual among the feasible multiples s of θ, 0 at least."""
    lam, kappa = problem.lam, problem.kappa
    size = stats.gradient.abs()
    first = problem.n if kappa < math.inf else 0
    free = size[:, first:]
    charge = torch.zeros_like(stats.square)
    if lam > 0:
        largest = lam / free.amax(dim=1) if free.shape[1] else torch.full_like(stats.square, math.inf)
    else:
        # Uθ = 0 up to rounding, and the rounding is charged at the size of its entry.
        level = _ROUNDING * problem.gram.diagonal().sqrt()[first:] * stats.square.sqrt().unsqueeze(1)
        largest = (free <= level).all(dim=1).to(stats.square.dtype)
        charge = (free * w[:, first:].abs()).sum(dim=1)
    s = stats.product / stats.square
    alpha = torch.zeros_like(s)
    if kappa < math.inf:
        # Concave in s with a kink at sα = λ: the maximum of one side, of the other, or the kink.
        alpha = size[:, : problem.n].amax(dim=1)
        inside, beyond = s * alpha <= lam, (s - kappa * alpha / stats.square) * alpha >= lam
        s = torch.where(inside, s, torch.where(beyond, s - kappa * alpha / stats.square, lam / alpha))
    # A θ of 0 has no best multiple.
    s = torch.minimum(s, largest).clamp(min=0).nan_to_num(0.0, posinf=0.0)
    beyond_ball = (s * alpha - lam).clamp(min=0) * kappa if kappa < math.inf else 0.0
    return (s * stats.product - 0.5 * s * s * stats.square - beyond_ball - charge).clamp(min=0)


def cast_inside(A: Tensor, dtype: torch.dtype, radius: float) -> Tensor:
    """A in another dtype, with ‖A‖∞ ≤ radius as that dtype computes it.

    Rounding n entries may lift their sum above the radius; such a row is scaled down, by a few units in the last
    place.

    Example:
        >>> import torch
        >>> from implicitdl.sim.certificate import cast_inside
        >>> A = cast_inside(torch.rand(5, 200, dtype=torch.float64) / 100, torch.float32, 0.5)
        >>> bool((A.abs().sum(dim=1) <= 0.5).all())
        True
    """
    A = A.to(dtype)
    eps = torch.finfo(dtype).eps
    while bool((outside := A.abs().sum(dim=1, keepdim=True) > radius).any()):
        size = A.abs().sum(dim=1, keepdim=True)
        A = torch.where(outside, A * (radius / size * (1 - eps)), A)
    return A
