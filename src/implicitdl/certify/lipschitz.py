"""Bounds of how much faster the output can change than the input: ‖y' − y‖ ≤ Lip ‖u' − u‖ for all inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._internal.errors import ArgumentError, extra, wrong
from ..statespace import StateSpace
from ..statespace.space import Model
from .contraction import contractive, exact_space, relative_rounding, sensitivity

# The order of the program's matrix, n + min(p, n + q): its cost grows with about the sixth power, here to minutes.
LARGEST = 120


def lipschitz_inf(model: Model) -> float:
    """A Lipschitz constant in the ∞-norm: ‖S‖∞ with the sensitivity matrix S.

    Arguments:
        model: an `ImplicitModel` or `StateSpace` whose equation contracts; any φ of bounded slope.

    Raises:
        ArgumentError: as `sensitivity`.

    Example:
        >>> import torch
        >>> from implicitdl import StateSpace, certify
        >>> model = StateSpace(torch.tensor([[0.5]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0]]))
        >>> round(certify.lipschitz_inf(model), 6)  # 3 · (1 + 1) / (1 − 0.5)
        12.0
    """
    found = contractive("lipschitz_inf", model)
    return float(sensitivity(found).sum(1).max()) * (1 + found.rounding)


def lipschitz_two(model: Model) -> float:
    """A Lipschitz constant in the 2-norm: the least of those that can be proved in closed form.

    With G = diag(max|φ'|):  ‖S‖₂ where the equation contracts; ‖C‖₂‖GB‖₂/(1 − ‖GA‖₂) + ‖D‖₂ where ‖GA‖₂ < 1; and
    ‖CG‖₂‖B‖₂/m + ‖D‖₂ where φ' ≥ 0 and I − sym(AG) ⪰ mI ≻ 0.

    Arguments:
        model: an `ImplicitModel` or `StateSpace` for which one of the three holds.

    Raises:
        ArgumentError: none of them does.

    Source: El Ghaoui et al. (2021) for S; Pabbaraju, Winston & Kolter, Estimating Lipschitz constants of monotone deep
        equilibrium models (2021), for the third.

    Example:
        >>> import torch
        >>> from implicitdl import StateSpace, certify
        >>> model = StateSpace(torch.tensor([[0.0, 9.0], [-9.0, 0.0]]), torch.eye(2), torch.eye(2))
        >>> round(certify.lipschitz_two(model), 6)
        1.0
    """
    who = "lipschitz_two"
    space = exact_space(who, model)
    found = [
        bound for bound in (_by_sensitivity(space), _by_norms(space), _by_monotonicity(space)) if bound is not None
    ]
    if not found:
        raise wrong(
            who, "a model with λ_pf < 1, ‖A‖₂ < 1 or I − sym(A) ≻ 0", "one with none of them",
            "See certify.well_posed(model).",
        )  # fmt: skip
    return min(found) * (1 + relative_rounding(0, space.dtype))


def _by_sensitivity(space: StateSpace) -> float | None:
    try:
        return _norm(sensitivity(space))
    except ArgumentError:
        return None


def _by_norms(space: StateSpace) -> float | None:
    slopes = space.slopes.unsqueeze(1)
    room = 1 - _norm(slopes * space.A)
    return _norm(space.C) * _norm(slopes * space.B) / room + _norm(space.D) if room > 0 else None


def _by_monotonicity(space: StateSpace) -> float | None:
    if any(block.activation.slope[0] < 0 for block in space.blocks) or space.n == 0:
        return None
    A, C = _unit_slopes(space)
    gap = torch.eye(space.n, dtype=A.dtype, device=A.device) - (A + A.t()) / 2
    m = float(torch.linalg.eigvalsh(gap)[0]) - relative_rounding(8 * space.n, A.dtype) * _norm(gap)
    return _norm(C) * _norm(space.B) / m + _norm(space.D) if m > 0 else None


def lipschitz_sdp(model: Model) -> float:
    """A Lipschitz constant in the 2-norm from a semidefinite program: for small models, tighter than `lipschitz_two`.

    √ρ for the least ρ for which a diagonal Λ ≻ 0 exists with

        [2Λ − ΛA − AᵀΛ − CᵀC,   −ΛB − CᵀD]
        [        ·          ,    ρI − DᵀD] ⪰ 0,

    where states are in units in which φ has slopes in [0, 1].  The solver only finds Λ: ρ is then computed from it, so
    that its tolerance cannot make the bound false.  Where p > n + q, inputs are first turned into the n + q dimensions
    that B and D see.

    Arguments:
        model: an `ImplicitModel` or `StateSpace` with φ' ≥ 0 and n + min(p, n + q) ≤ 120.

    Raises:
        ArgumentError: a larger model, a φ that may decrease, or no Λ found.
        MissingExtraError: cvxpy is not installed.

    Source: Revay, Wang & Manchester, Lipschitz bounded equilibrium networks (2020); for x, x' with inputs u, u' the
        slopes give (Δz − Δx)ᵀΛΔx ≥ 0, and the matrix says ρ‖Δu‖² − ‖Δy‖² ≥ 2(Δz − Δx)ᵀΛΔx.

    Example:
        >>> import torch
        >>> from implicitdl import StateSpace, certify
        >>> model = StateSpace(torch.tensor([[0.5]]), torch.tensor([[1.0]]), torch.tensor([[3.0]]))
        >>> round(certify.lipschitz_sdp(model), 3)
        6.0
    """
    who = "lipschitz_sdp"
    space = exact_space(who, model)
    for block in space.blocks:
        if block.activation.slope[0] < 0:
            raise wrong(who, "φ' ≥ 0", f"{block.activation.name}, of slopes {block.activation.slope}")
    A, C = _unit_slopes(space)
    # y depends on u through [B; D]u = RᵀQᵀu alone, and ‖Qᵀu‖ ≤ ‖u‖.
    if space.p > space.n + space.q:
        R = torch.linalg.qr(torch.cat([space.B, space.D]).t()).R
        B, D = R.t().split([space.n, space.q])
    else:
        B, D = space.B, space.D
    if space.n + B.shape[1] > LARGEST:
        raise wrong(
            who, f"n + min(p, n + q) ≤ {LARGEST}", space.n + B.shape[1],
            "Use lipschitz_two, or reduce the model first.",
        )  # fmt: skip
    weights = _solved(who, A, B, C, D)
    if not bool((weights > 0).all()):  # of an equation without a unique solution, such as x = relu(2x + u)
        raise wrong(who, "a Λ with positive entries", f"{float(weights.min()):.3g}", "See certify.well_posed(model).")
    P, K = _blocks(weights, A, B, C, D, -1.0)
    # What they may be off by in norm: P is a difference of larger terms, and B and D have the rounding of their QR.
    relative, both = relative_rounding(8 * (space.n + space.q), P.dtype), _norm(torch.cat([space.B, space.D]))
    P_terms, K_terms = _blocks(weights, A.abs(), B.abs(), C.abs(), D.abs(), 1.0)
    P_off, K_off = (
        relative * _norm(P_terms),
        relative * (_norm(K_terms) + (_norm(torch.diag(weights)) + _norm(C)) * both),
    )
    values, vectors = torch.linalg.eigh(P)
    # The eigenvectors are those of a matrix that is off from P by its rounding, and P from the true one.
    values = values - 2 * P_off
    least = float(values[0]) if space.n else torch.inf
    if not least > P_off:
        raise wrong(who, "a Λ with a positive definite matrix", f"least eigenvalue {least:.3g}", "Use lipschitz_two.")
    # √ρ is the norm of [D; P^-½K].
    root = _norm(torch.cat([D, vectors.t() @ K / values.sqrt().unsqueeze(1)]))
    return (root + relative * both + (K_off + relative * _norm(K)) / least**0.5) * (1 + relative_rounding(0, P.dtype))


def _blocks(weights: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """2Λ − ΛA − AᵀΛ − CᵀC and ΛB + CᵀD; of absolute values with the other sign, the size of their terms."""
    rows = weights.unsqueeze(1)
    return 2 * torch.diag(weights) + sign * (rows * A + A.t() * weights + C.t() @ C), rows * B + C.t() @ D


def _solved(who: str, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Λ of the program, a little inside its set, so that what is computed from it is well conditioned."""
    cp: Any = extra("cvxpy", "sim")
    inside = 1e-6 * (_norm(C) ** 2 + _norm(D) ** 2)
    a, b, c, d = (M.cpu().numpy() for M in (A, B, C, D))
    diagonal, rho = cp.Variable(len(a)), cp.Variable()
    weights = cp.diag(diagonal)
    corner = -weights @ b - c.T @ d
    state = 2 * weights - weights @ a - a.T @ weights - c.T @ c
    matrix = cp.bmat([[state, corner], [corner.T, rho * np.eye(d.shape[1]) - d.T @ d]])
    problem = cp.Problem(cp.Minimize(rho), [(matrix + matrix.T) / 2 >> inside * np.eye(matrix.shape[0])])
    problem.solve(solver=cp.CLARABEL)
    if diagonal.value is None:
        raise wrong(who, "a diagonal Λ for the model", f"status {problem.status}", "Use lipschitz_two.")
    return torch.from_numpy(np.asarray(diagonal.value)).to(A)


def _unit_slopes(space: StateSpace) -> tuple[Tensor, Tensor]:
    """A and C for the state x/max|φ'|, whose activations have slopes of at most 1."""
    slopes = space.slopes
    return space.A * slopes, space.C * slopes


def _norm(M: Tensor) -> float:
    """‖M‖₂, rounded upwards: a singular value is off by a modest multiple of the rounding of a product."""
    largest = float(torch.linalg.matrix_norm(M, 2)) if M.numel() else 0.0
    return largest * (1 + 8 * relative_rounding(sum(M.shape), M.dtype))
