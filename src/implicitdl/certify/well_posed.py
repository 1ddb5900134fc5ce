"""Whether x = φ(Ax + b) has exactly one solution for every b, and which condition proves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import RELU
from ..statespace import StateSpace, perron_root
from ..statespace.blocks import slopes_of
from ..statespace.graph import components, looping
from ..statespace.perron import gains
from .normal import Model, exact_space, perron_certificate, rounding
from .p_matrix import LARGEST, p_matrix

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
    slopes = slopes_of(space.blocks, space.b_x)
    A = space.A * slopes
    loops = A.diagonal()
    if bool((loops < 1).all()):
        condition, v = _perron("Perron–Frobenius without self-loops", _without_diagonal(M, loops))
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
    inside = sum(map(len, components(looping(A)[0])))
    holds = inside == 0
    return Condition(
        "no loops", holds, "no state depends on itself" if holds else f"{inside} of {len(A)} states in loops"
    )


def _norm(M: Tensor) -> Condition:
    norm = float(M.sum(1).max())
    holds = norm * (1 + rounding(len(M), M.dtype)) < 1
    return Condition("∞-norm", holds, f"max_i L_i Σ_j |a_ij| = {norm:.6g} {'<' if holds else '≥'} 1")


def _perron(name: str, M: Tensor) -> tuple[Condition, Tensor | None]:
    found = perron_certificate(M)
    if found is None:
        return Condition(name, False, f"λ_pf = {perron_root(M):.6g}, and < 1 is needed"), None
    v, gamma = found
    return Condition(name, True, f"Mv ≤ {gamma:.6g} v, v from {float(v.min()):.3g} to {float(v.max()):.3g}"), v


def _without_diagonal(M: Tensor, loops: Tensor) -> Tensor:
    """|dx_i| ≤ Σ_j≠i M_ij|dx_j| / (1 − L_i a_ii): D/(1 − Da) grows with D in [0, L], for a < 1/L."""
    return (M - torch.diag(M.diagonal())) / (1 - loops).unsqueeze(1)


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
