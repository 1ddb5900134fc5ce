"""The Perron–Frobenius root of |A|: below 1, x = φ(Ax + b) contracts in suitable weights, and errors stay bounded."""

from __future__ import annotations

import torch
from torch import Tensor

from .._internal.errors import open_unit, wrong
from ..activations import IDENTITY
from .matrices import eye, loops, take, with_values
from .space import StateSpace

# Weights are computed for a κ smaller by this much, so that what rounding takes away never shows.
_SLACK = 1e-9
# Sweeps before weights are computed by linear solves: a network without loops needs as many as it has layers.
_SWEEPS = 100


def perron_root(A: Tensor) -> float:
    """λ_pf(|A|), the spectral radius of the matrix of absolute values; 0 when nothing loops.

    Below 1, the equilibrium x = φ(Ax + b) exists and is unique for every φ of slopes in [−1, 1].  It is the largest
    root of the strongly connected components of A's graph, each of them found between the two bounds of Collatz and
    Wielandt, min (|A|v)_i/v_i ≤ λ ≤ max (|A|v)_i/v_i; the upper one is returned.

    Arguments:
        A: (n, n), dense or sparse.  A component that loops is made dense.

    Source: El Ghaoui et al., Implicit Deep Learning (2021), for the condition; Noda, Note on the computation of the
    maximal eigenvalue of a non-negative irreducible matrix, Numer. Math. 17 (1971), for the iteration.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import perron_root
        >>> round(perron_root(torch.tensor([[0.0, -2.0], [0.5, 0.0]], dtype=torch.float64)), 6)
        1.0
        >>> perron_root(torch.tensor([[0.0, 7.0], [0.0, 0.0]]))
        0.0
    """
    A, root = A.detach(), 0.0
    for nodes in loops(A):
        root = max(root, _irreducible_root(take(A, nodes, nodes).to_dense().abs().double()))
    return root


def gains(space: StateSpace) -> Tensor:
    """|A| with each row times max|φ'| of its state: how far a change of one state can change another."""
    A = space.A.detach()
    # A slope may be infinite, and 0 · ∞ is not the effect of an arc that does not exist.
    if space.is_sparse:
        size = A.values().abs()
        return with_values(A, torch.where(size == 0, 0.0, space.slopes[A.indices()[0]] * size))
    return torch.where(A == 0, 0.0, space.slopes.unsqueeze(1) * A.abs())


def loop_gain(space: StateSpace) -> float:
    """λ_pf of |A| with each row times max|φ'| of its state: below 1, the model is well posed.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, loop_gain
        >>> loop_gain(StateSpace(torch.tensor([[-0.5]]), torch.eye(1), torch.eye(1)))
        0.5
    """
    return perron_root(gains(space))


def perron_weights(A: Tensor, kappa: float) -> Tensor:
    """The least v ≥ 1 with |A|v ≤ κv: in units of v the matrix has ‖·‖∞ ≤ κ.

    v is the limit of v ← max(1, |A|v/κ) from v = 1.  That limit exists whenever λ_pf(|A|) < κ, also for reducible and
    nilpotent A, whose Perron vector has zeros.  Where it is far, it is found by policy iteration: the rows with
    (|A|v)_i/κ > 1 only become more, and given them v is the solution of a linear system.

    Arguments:
        A: (n, n), dense or sparse.
        kappa: κ in (0, 1).

    Returns:
        (n,) in float64.

    Raises:
        ArgumentError: λ_pf(|A|) ≥ κ, with the number.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import perron_weights
        >>> perron_weights(torch.tensor([[0.0, 7.0], [0.0, 0.0]]), kappa=0.5)
        tensor([14.0000,  1.0000], dtype=torch.float64)
    """
    open_unit("perron_weights", "kappa", kappa)
    v = least_weights(A.detach().double().abs(), kappa)
    if v is None:
        raise wrong(
            "perron_weights", f"λ_pf(|A|) < κ = {kappa:.6g}", f"λ_pf(|A|) = {perron_root(A):.6g}",
            "Take a κ between it and 1.",
        )  # fmt: skip
    return v


def least_weights(M: Tensor, kappa: float) -> Tensor | None:
    """The v of `perron_weights` for M ≥ 0 in float64; None where λ_pf(M) ≥ κ."""
    v = _swept(M, kappa, torch.ones(len(M), dtype=M.dtype, device=M.device))
    if v is None and perron_root(M) < kappa * (1 - _SLACK):
        v = _swept(M, kappa, _by_policies(M.to_dense() / (kappa * (1 - _SLACK))))
    return v


def spread(space: StateSpace, r: Tensor) -> Tensor:
    """An upper bound of (I − M)⁻¹ r, where M is |A| with rows times max|φ'|: how far deviations r move the states.

    If every equation of the model is off by at most r, |x − φ(Ax + b)| ≤ r, then x is at most this far from the
    solution.  A result with shortfall s = (M e + r − e)₊ is made safe by weights v with Mv ≤ κv: e + δv covers it with
    δ = max(s/v) / (1 − κ).

    Arguments:
        space: with λ_pf(M) < 1.
        r: (batch, n) ≥ 0, float64.

    Returns:
        (batch, n) in float64.

    Raises:
        ArgumentError: λ_pf(M) ≥ 1, with the number.
    """
    M = gains(space).double()
    if not (root := perron_root(M)) < 1:
        raise wrong("spread", "λ_pf(|A|) max|φ'| < 1", f"{root:.6g}", "Errors may grow without bound in such a loop.")
    blocks = [(IDENTITY, block.size) for block in space.blocks]
    identity = eye(space.n, M)
    e = StateSpace(M, identity, identity, blocks=blocks).state(r, on_failure="ignore")
    short = (r + (M @ e.t()).t() - e).clamp(min=0.0)
    if not bool(short.any()):
        return e
    kappa = (1 + root) / 2
    v = perron_weights(M, kappa)
    return e + (short / v).amax(1, keepdim=True) / (1 - kappa) * v


def evaluation_error(space: StateSpace, x: Tensor, u: Tensor) -> Tensor:
    """(batch, n) what rounding can do to one evaluation of z = Ax + Bu + b_x: (terms) · eps · (sum of sizes)."""
    size = space.holding(A=space.A.abs(), B=space.B.abs(), b_x=space.b_x.abs()).pre_activation(x.abs(), u.abs())
    return (space.n + space.p + 1) * torch.finfo(x.dtype).eps * size


def _swept(M: Tensor, kappa: float, v: Tensor) -> Tensor | None:
    """v after as many steps of v ← max(1, Mv/κ) as make Mv ≤ κv true in floating point; None after too many."""
    for _ in range(_SWEEPS):
        grown = M @ v
        if bool((grown <= kappa * v).all() & torch.isfinite(v).all()):
            return v
        v = (grown / (kappa * (1 - _SLACK))).clamp(min=1.0)
    return None


def _by_policies(M: Tensor) -> Tensor:
    """The least fixed point of v ↦ max(1, Mv) for M ≥ 0 of spectral radius below 1."""
    v = torch.ones(len(M), dtype=M.dtype, device=M.device)
    growing = M @ v > 1
    while True:
        S, rest = growing.nonzero().flatten(), (~growing).nonzero().flatten()
        system = torch.eye(len(S), dtype=M.dtype, device=M.device) - take(M, S, S)
        v[S] = torch.linalg.solve(system, take(M, S, rest).sum(1))
        more = growing | (M @ v > 1)
        if bool((more == growing).all()):
            return v
        growing = more


def _irreducible_root(M: Tensor) -> float:
    """The root of an irreducible M ≥ 0 by Noda's iteration: inverse iteration with the upper bound as the shift.

    From any v > 0 the bound falls monotonically and quadratically.
    """
    if not bool(torch.isfinite(M).all()):
        return float("inf")
    v = torch.ones(len(M), dtype=M.dtype, device=M.device)
    identity = torch.eye(len(M), dtype=M.dtype, device=M.device)
    best = float("inf")
    while True:
        ratios = (M @ v) / v
        upper, lower = float(ratios.max()), float(ratios.min())
        # At rounding level the bound stops falling, or the shifted matrix is singular.
        if not upper < best or upper - lower <= len(M) * torch.finfo(M.dtype).eps * upper:
            return min(upper, best)
        best = upper
        w, info = torch.linalg.solve_ex(upper * identity - M, v)
        if int(info) != 0 or not bool((w > 0).all() & torch.isfinite(w).all()):
            return best
        v = w / w.max()
