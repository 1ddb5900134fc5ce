"""Whether x = φ(Ax + b) has exactly one solution for every b, and which condition proves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..activations import RELU
from ..statespace import StateSpace, perron_root
from ..statespace.matrices import loops
from ..statespace.perron import gains
from ..statespace.space import Model
from .contraction import exact_space, perron_certificate, relative_rounding

# 2²⁰ principal minors take about a second; every further state doubles that.
LARGEST = 20
# An eigenvalue of a symmetric matrix is off by a modest multiple of n·eps·‖·‖; LAPACK's own bound is that with 1.
_EIGENVALUE = 8


@dataclass(frozen=True)
class Condition:
    """One sufficient condition.

    Attributes:
        name: in words.
        holds: True when it is proved to hold, False when it is not met, None where rounding or size leaves it open.
        figure: what was compared, with the comparison.
        decides: whether a model that fails it is ill posed.
    """

    name: str
    holds: bool | None
    figure: str
    decides: bool = False


@dataclass(frozen=True, eq=False)
class WellPosedness:
    """The conditions in the order they were tried, up to the first that holds.

    Attributes:
        unique: True when one of them proves a unique equilibrium for every input, False when one proves that there is
            an input without or with several, None when nothing is proved.
        conditions: as tried.
        weights: v > 0 with diag(max|φ'|)|A|v < v where such a v is the proof; (n,) float64.
    """

    unique: bool | None
    conditions: tuple[Condition, ...]
    weights: Tensor | None = None

    def __bool__(self) -> bool:
        return self.unique is True

    def __str__(self) -> str:
        words = {True: "holds", False: "fails", None: "open"}
        lines = [f"{c.name}: {words[c.holds]}   {c.figure}" for c in self.conditions]
        verdict = {True: "well posed", False: "not well posed", None: "not proved to be well posed"}[self.unique]
        return "\n".join([verdict, *(f"  {line}" for line in lines)])


def well_posed(model: Model) -> WellPosedness:
    """Prove that the model's equation has exactly one solution for every input, if one of these conditions does.

    With L = max|φ'| of each state, and L = 1 for most φ:

    no loops     the states can be ordered so that each needs only later ones: for any φ
    ∞-norm       max_i L_i Σ_j |a_ij| < 1
    Perron       λ_pf(diag(L)|A|) < 1, proved by v > 0 with diag(L)|A|v < v
    loops        the same after x_i = φ(a_ii x_i + s) is solved for x_i, which keeps the sign of a_ii: for φ' ≥ 0
    monotone     I − sym(A diag(L)) ≻ 0: for φ' ≥ 0
    P-matrix     all principal minors of I − A diag(L) are positive: for φ' ≥ 0 and n ≤ 20; for ReLU also necessary

    They are tried in this order.  All figures are of the weights as they are, in float64, and a condition holds only
    when it does by more than the rounding of its own computation.

    Arguments:
        model: an `ImplicitModel` or `StateSpace`.

    Returns:
        The `WellPosedness`, which is true when it is proved.

    Source: El Ghaoui et al., Implicit Deep Learning (2021) for Perron–Frobenius; Jafarpour et al. (2021) for the loops;
        Winston & Kolter, Monotone Operator Equilibrium Networks (2020); Cottle, Pang & Stone, The Linear
        Complementarity Problem, for P-matrices: x = relu(Ax + b) is the linear complementarity problem of I − A.

    Example:
        >>> import torch
        >>> from implicitdl import StateSpace, certify
        >>> turn = StateSpace(torch.tensor([[0.0, 9.0], [-9.0, 0.0]]), torch.eye(2), torch.eye(2))
        >>> found = certify.well_posed(turn)
        >>> bool(found), found.conditions[-1].name
        (True, 'monotone')
    """
    space = exact_space("well_posed", model)
    M = gains(space)
    tried = [_no_loops(space.A)]
    if not tried[-1].holds:
        tried.append(_norm(M))
    if tried[-1].holds or not bool(torch.isfinite(M).all()):
        return WellPosedness(tried[-1].holds or None, tuple(tried))
    condition, v = _perron("Perron–Frobenius", M)
    tried.append(condition)
    if v is not None:
        return WellPosedness(True, tuple(tried), v)
    if all(block.activation.slope[0] >= 0 for block in space.blocks):
        return _nondecreasing(space, M, tried)
    return WellPosedness(None, tuple(tried))


def _nondecreasing(space: StateSpace, M: Tensor, tried: list[Condition]) -> WellPosedness:
    """The conditions that also need φ' ≥ 0."""
    # In x/L the activations have slopes in [0, 1] and the matrix is A diag(L).
    slopes = space.slopes
    A = space.A * slopes
    diagonal = A.diagonal()
    if bool((diagonal < 1).all()):
        condition, v = _perron("Perron–Frobenius without self-loops", _without_diagonal(M, diagonal))
        tried.append(condition)
        if v is not None:
            return WellPosedness(True, tuple(tried), v)
    tried.append(_monotone(A))
    if tried[-1].holds:
        return WellPosedness(True, tuple(tried))
    only_relu = all(block.activation is RELU for block in space.blocks)
    tried.append(_p_matrix(space.A, slopes, only_relu))
    return WellPosedness(False if tried[-1].holds is False and only_relu else tried[-1].holds or None, tuple(tried))


def _no_loops(A: Tensor) -> Condition:
    inside = sum(map(len, loops(A)))
    holds = inside == 0
    return Condition(
        "no loops", holds, "no state depends on itself" if holds else f"{inside} of {len(A)} states in loops"
    )


def _norm(M: Tensor) -> Condition:
    norm = float(M.sum(1).max())
    holds = norm * (1 + relative_rounding(len(M), M.dtype)) < 1
    return Condition("∞-norm", holds, f"max_i L_i Σ_j |a_ij| = {norm:.6g} {'<' if holds else '≥'} 1")


def _perron(name: str, M: Tensor) -> tuple[Condition, Tensor | None]:
    found = perron_certificate(M)
    if found is None:
        return Condition(name, False, f"λ_pf = {perron_root(M):.6g}, and < 1 is needed"), None
    v, gamma = found
    return Condition(name, True, f"Mv ≤ {gamma:.6g} v, v from {float(v.min()):.3g} to {float(v.max()):.3g}"), v


def _without_diagonal(M: Tensor, diagonal: Tensor) -> Tensor:
    """|dx_i| ≤ Σ_j≠i M_ij|dx_j| / (1 − L_i a_ii): D/(1 − Da) grows with D in [0, L], for a < 1/L."""
    return (M - torch.diag(M.diagonal())) / (1 - diagonal).unsqueeze(1)


def _monotone(A: Tensor) -> Condition:
    gap = torch.eye(len(A), dtype=A.dtype, device=A.device) - (A + A.t()) / 2
    least = float(torch.linalg.eigvalsh(gap)[0])
    slack = _EIGENVALUE * len(A) * torch.finfo(A.dtype).eps * float(torch.linalg.matrix_norm(gap))
    holds = True if least > slack else False if least < -slack else None
    return Condition("monotone", holds, f"λ_min(I − sym(A)) = {least:.6g}, known to ±{slack:.1g}")


def _p_matrix(A: Tensor, slopes: Tensor, decides: bool) -> Condition:
    name = "P-matrix"
    if len(A) > LARGEST:
        return Condition(name, None, f"not tried: n = {len(A)} > {LARGEST}", decides)
    eps = torch.finfo(A.dtype).eps
    M = torch.eye(len(A), dtype=A.dtype, device=A.device) - A * slopes
    # Rounding of the difference, and of the products where they are not with 1.
    holds = p_matrix(M, eps * (M.abs() + (A * slopes).abs() * (slopes != 1)))
    words = {True: "are all positive", False: "are not all positive", None: "are too near 0 to tell"}[holds]
    return Condition(name, holds, f"the principal minors of I − A {words}", decides)


def p_matrix(M: Tensor, off: Tensor | None = None) -> bool | None:
    """Whether all 2ⁿ − 1 principal minors of M are positive.

    M is one exactly when m₁₁ > 0 and both M without its first row and column and the Schur complement of m₁₁ are.  That
    recursion runs level by level on whole stacks of matrices, with a bound of the rounding carried beside every entry.

    Arguments:
        M: (n, n), n ≤ 20.
        off: (n, n), by how much the entries of M may be off; 0 when left out.

    Returns:
        True or False when that is certain; None when rounding leaves it open.

    Raises:
        ArgumentError: n > 20.

    Source: Tsatsomeros & Li, A recursive test for P-matrices (2000).

    Example:
        >>> import torch
        >>> from implicitdl.certify import p_matrix
        >>> p_matrix(torch.tensor([[1.0, -5.0], [5.0, 1.0]])), p_matrix(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        (True, False)
    """
    if M.dim() != 2 or M.shape[0] != M.shape[1]:
        raise wrong("p_matrix", "a square matrix", tuple(M.shape))
    if len(M) > LARGEST:
        raise wrong(
            "p_matrix", f"n ≤ {LARGEST}", f"n={len(M)}, with 2^{len(M)} principal minors",
            "Use the Perron–Frobenius or the monotone condition.",
        )  # fmt: skip
    stack = M.detach().double().unsqueeze(0)
    error = torch.zeros_like(stack) if off is None else off.double().unsqueeze(0)
    while stack.shape[1]:
        pivot, known_to = stack[:, 0, 0], error[:, 0, 0]
        if bool((pivot <= -known_to).any()):
            return False  # all earlier pivots are certain, and a minor is their product with this one
        if not bool((pivot > known_to).all()):
            return None
        rest, rest_error = stack[:, 1:, 1:], error[:, 1:, 1:]
        complement, complement_error = _schur(stack, error)
        stack, error = torch.cat([rest, complement]), torch.cat([rest_error, complement_error])
    return True


def _schur(M: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """M₂₂ − M₂₁M₁₂/m₁₁ of every matrix of a stack, and a bound of how far it is off when M is off by E."""
    column, row, pivot = M[:, 1:, :1], M[:, :1, 1:], M[:, :1, :1]
    column_error, row_error, pivot_error = E[:, 1:, :1], E[:, :1, 1:], E[:, :1, :1]
    product = column * row / pivot
    complement = M[:, 1:, 1:] - product
    # |ab/p − a'b'/p'| ≤ (|a'b' − ab| + |ab/p||p' − p|)/|p'| with |p'| ≥ p − E_p, and three roundings of eps/2 each;
    # 4 eps also covers those of this bound, which is a sum of nonnegative terms.
    numerator = column_error * row.abs() + column.abs() * row_error + column_error * row_error
    carried = (numerator + product.abs() * pivot_error) / (pivot - pivot_error)
    rounded = 4 * torch.finfo(M.dtype).eps * (M[:, 1:, 1:].abs() + product.abs() + carried)
    return complement, E[:, 1:, 1:] + carried + rounded
