"""Random state-space models for property tests, and their outputs to the last digits."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from implicitdl import Auto, StateSpace
from implicitdl.activations import HARDTANH, IDENTITY, LEAKY_RELU, RELU, SIGMOID, TANH

KINDS = (RELU, TANH, IDENTITY, LEAKY_RELU, SIGMOID, HARDTANH)
HOMOGENEOUS = (RELU, LEAKY_RELU, IDENTITY)


def random_space(seed, p, q, kinds=KINDS, blocks=3, kappa=0.7, density=0.6):
    """Well posed by ‖A‖∞ ≤ κ, with a few blocks of one to four states, and zeros."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * (
            torch.rand(*shape, generator=g, dtype=torch.float64) < density
        )

    pairs = [
        (kinds[int(torch.randint(len(kinds), (), generator=g))], int(torch.randint(1, 5, (), generator=g)))
        for _ in range(blocks)
    ]
    n = sum(size for _, size in pairs)
    A = normal(n, n)
    A = kappa * A / A.abs().sum(1, keepdim=True).clamp(min=1)
    return StateSpace(A, normal(n, p), normal(q, n), normal(q, p), normal(n), normal(q), blocks=pairs)


def inputs(seed, p, batch=5):
    return 2 * torch.randn(batch, p, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def tight(space, u):
    """y, with what loops solved as far as float64 goes."""
    return space.read_out(space.solve(u, solver=Auto(rtol=1e-13)).value, u)


def close(one, other, atol=1e-10):
    return torch.allclose(one, other, rtol=1e-10, atol=atol)


seeds = st.integers(0, 2**31 - 2)
sizes = st.integers(1, 4)
