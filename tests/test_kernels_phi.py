"""φ and φ' of the compiled loop against 40 digits: to a few ulp over the whole range."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from implicitdl.activations import COMPILED, ELU, GELU, SIGMOID, SILU, SOFTPLUS, TANH
from implicitdl.kernels import build, loops
from precision import digits

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(build.library(torch.float64) is None, reason="no C compiler"),
]

mp = mpmath.mp.clone()
mp.dps = 40


def sigmoid(z):
    return 1 / (1 + mp.exp(-z))


def normal(z):
    return mp.erfc(-z / mp.sqrt(2)) / 2


# φ, φ' and the ulps by which each may be off.
EXACT = {
    TANH: (mp.tanh, lambda z: mp.sech(z) ** 2),
    SIGMOID: (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    SOFTPLUS: (lambda z: mp.log1p(mp.exp(z)), sigmoid),
    ELU: (lambda z: z if z > 0 else mp.expm1(z), lambda z: mp.exp(min(z, 0))),
    SILU: (lambda z: z * sigmoid(z), lambda z: sigmoid(z) * (1 + z * sigmoid(-z))),
    GELU: (lambda z: z * normal(z), lambda z: normal(z) + z * mp.npdf(z)),
}


def compiled(phi, z):
    """φ and φ' of the loop: x = φ(0x + b) is solved as soon as it is looked at."""
    A = z.new_zeros(z.shape[1], z.shape[1])
    swept = loops.sweeps(A, None, z, None, phi.compiled, None, 1e-3, 0.0, 5, 2, 0.7, 5)
    return swept.x, swept.slope, swept.unsolved


def points(dtype):
    tiny = torch.finfo(dtype).tiny
    sizes = [0.0, tiny / 8, tiny, 1e-30, 1e-10, 1e-5, *np.geomspace(1e-3, 120, 150), 500.0, 720.0, 1e4, 1e15]
    return torch.tensor([sign * size for size in sizes for sign in (1, -1)], dtype=dtype)


def ulps(got, exact, dtype):
    """Off by how many units in the last place, of numbers that are normal."""
    info = torch.finfo(dtype)
    return [
        float(abs(mp.mpf(g) - e) / (abs(e) * info.eps))
        if abs(e) >= info.tiny
        else float(abs(mp.mpf(g) - e) / info.tiny)
        for g, e in zip(got.tolist(), exact, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("phi", EXACT, ids=lambda phi: phi.name)
def test_value_and_slope_are_right_to_the_last_digits(phi, dtype):
    z = points(dtype)
    (value,), (slope,), _ = compiled(phi, z[None])  # in one row, whose norm is that of a normal number
    exact = [mp.mpf(number) for number in z.tolist()]
    assert max(ulps(value, [EXACT[phi][0](number) for number in exact], dtype)) <= 4
    # Where a slope crosses 0 it has the digits of its parts.
    off = [
        min(relative, float(abs(mp.mpf(s) - e)) / torch.finfo(dtype).eps)
        for s, number, relative in zip(
            slope.tolist(), exact, ulps(slope, [EXACT[phi][1](number) for number in exact], dtype), strict=True
        )
        for e in [EXACT[phi][1](number)]
    ]
    assert max(off) <= 8


@pytest.mark.parametrize("phi", COMPILED, ids=lambda phi: phi.name)
def test_what_is_not_a_number_is_left_to_torch(phi):
    *_, unsolved = compiled(phi, torch.tensor([[float("nan")], [0.5]]))
    assert unsolved == 1


@pytest.mark.parametrize("n", [1, 3, 5, 8, 13])
@pytest.mark.parametrize("phi", EXACT, ids=lambda phi: phi.name)
def test_lanes_behind_the_last_number_count_for_nothing(phi, n):
    b = torch.linspace(-2, 2, 2 * n).view(2, n)
    swept = loops.sweeps(torch.zeros(n, n), None, b, torch.ones(2, n), phi.compiled, None, 1e-9, 0.0, 9, 2, 0.7, 9)
    assert torch.allclose(swept.x, phi.phi(b), rtol=digits(1e-9, 1e-5))  # GELU of torch's cancels where z < 0
    assert swept.stats.steps.tolist() == [2, 2]
