"""How far a row is from its optimum: a feasible dual point made from its residual."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .face import Rows, newton
from .problem import Look, RowProblem
from .solution import RowReport

# Corrections of the dual point: the first takes out what a nearly singular system left, the second its own rounding.
_CORRECTIONS = 2
# |u_jᵀθ| below this share of ‖u_j‖‖θ‖ is rounding, which λ = 0 has to call zero.
_ROUNDING = 1e-10


def certify(problem: RowProblem, w: Tensor, tol: float, *, move: bool = True) -> tuple[RowReport, Tensor]:
    """The report of w, and g = Φθ: minus the gradient of the smooth part there.

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
    look = problem.look(w)
    objective = problem.objective(w, look.square)
    bound = _dual(problem, look, w)
    # A residual of rounding errors alone, which add up like a random walk: no row comes closer to t.
    size = problem.target_square + problem.gram.trace() * (w * w).sum(dim=1)
    floor = 0.5 * torch.finfo(w.dtype).eps ** 2 * max(problem.T.shape[1], w.shape[1]) * size
    open_ = torch.nonzero(objective - bound > tol * objective + floor)[:, 0]
    if move and len(open_) > 0:
        bound[open_] = torch.maximum(bound[open_], _corrected(problem.take(open_), w[open_], look.take(open_)))
    gap = (objective - bound).clamp(min=0)
    report = RowReport(
        objective=objective,
        gap=gap,
        norm=w[:, : problem.n].abs().sum(dim=1),
        support=(w != 0).sum(dim=1),
        rounding=floor,
        converged=gap <= tol * objective + floor,
    )
    return report, look.gradient


def _corrected(problem: RowProblem, w: Tensor, look: Look) -> Tensor:
    """The dual value of θ after Newton steps on the face of w and of what violates its bound, made in θ alone."""
    rows = Rows.at(w, look.gradient, problem.n, problem.kappa)
    _, tau = newton(problem.faces, rows, problem.n, problem.lam)
    bound = torch.full_like(w, problem.lam)
    bound[:, : problem.n] += tau.clamp(min=0).unsqueeze(1)
    rows.sign = torch.where((w == 0) & (look.gradient.abs() > bound), look.gradient.sign(), rows.sign)
    correction = torch.zeros_like(w)
    for _ in range(_CORRECTIONS):
        correction += newton(problem.faces, rows, problem.n, problem.lam)[0]
        look = problem.look(w, correction)
        rows.g = look.gradient
    return _dual(problem, look, w)


def _dual(problem: RowProblem, look: Look, w: Tensor) -> Tensor:
    """The largest value of the dual among the feasible multiples s of θ, 0 at least."""
    lam, kappa = problem.lam, problem.kappa
    size = look.gradient.abs()
    first = problem.n if kappa < math.inf else 0
    free = size[:, first:]
    charge = torch.zeros_like(look.square)
    if lam > 0:
        largest = lam / free.amax(dim=1) if free.shape[1] else torch.full_like(look.square, math.inf)
    else:
        # Uθ = 0 up to rounding, and the rounding is charged at the size of its entry.
        level = _ROUNDING * problem.gram.diagonal().sqrt()[first:] * look.square.sqrt().unsqueeze(1)
        largest = (free <= level).all(dim=1).to(look.square.dtype)
        charge = (free * w[:, first:].abs()).sum(dim=1)
    s = look.product / look.square
    alpha = torch.zeros_like(s)
    if kappa < math.inf:
        # Concave in s with a kink at sα = λ: the maximum of one side, of the other, or the kink.
        alpha = size[:, : problem.n].amax(dim=1)
        inside, beyond = s * alpha <= lam, (s - kappa * alpha / look.square) * alpha >= lam
        s = torch.where(inside, s, torch.where(beyond, s - kappa * alpha / look.square, lam / alpha))
    # A θ of 0 has no best multiple.
    s = torch.minimum(s, largest).clamp(min=0).nan_to_num(0.0, posinf=0.0)
    beyond_ball = (s * alpha - lam).clamp(min=0) * kappa if kappa < math.inf else 0.0
    return (s * look.product - 0.5 * s * s * look.square - beyond_ball - charge).clamp(min=0)


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
