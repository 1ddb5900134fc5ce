"""Errors that spread through a loop: e = M e + r with M ≥ 0, bounded from above however well it is solved."""

from __future__ import annotations

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..activations import IDENTITY
from .matrices import eye
from .perron import gains, perron_root, perron_weights
from .space import StateSpace


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
    e = StateSpace(M, identity, identity, blocks=blocks).solve(r, on_failure="ignore").value
    assert isinstance(e, Tensor)
    short = (r + (M @ e.t()).t() - e).clamp(min=0.0)
    if not bool(short.any()):
        return e
    kappa = (1 + root) / 2
    v = perron_weights(M, kappa)
    return e + (short / v).amax(1, keepdim=True) / (1 - kappa) * v


def rounding(space: StateSpace, x: Tensor, u: Tensor) -> Tensor:
    """(batch, n) what rounding can do to one evaluation of z = Ax + Bu + b_x: (terms) · eps · (sum of sizes)."""
    size = space.holding(A=space.A.abs(), B=space.B.abs(), b_x=space.b_x.abs()).pre_activation(x.abs(), u.abs())
    return (space.n + space.p + 1) * torch.finfo(x.dtype).eps * size
