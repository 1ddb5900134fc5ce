"""Bounds are true to the last digit: what is computed of φ, of products that underflow, and of nearly singular programs."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from exact_outputs import LONG, PHI
from implicitdl import ArgumentError, StateSpace, certify
from implicitdl.activations import BUILTIN, IDENTITY, SOFTPLUS
from implicitdl.certify import Box, Crown, Interval, Sensitivity
from implicitdl.certify.interval import outwards

F64 = torch.float64


def matrix(*entries: float) -> torch.Tensor:
    return torch.tensor([entries], dtype=F64)


@pytest.mark.parametrize("name", [name for name, phi in BUILTIN.items() if phi.slope[0] >= 0])
def test_what_is_computed_of_phi_holds_it(name):
    z = np.concatenate(
        [sign * 10.0 ** np.linspace(-320, 2.9, 20_001) for sign in (-1, 1)] + [np.linspace(-45, 45, 9001)]
    )
    z = z[None]
    value = BUILTIN[name].phi(torch.from_numpy(z))
    around, exact = outwards(value, value), PHI[name](z.astype(LONG))
    assert (around.lower.numpy() <= exact).all()
    assert (exact <= around.upper.numpy()).all()


@pytest.mark.parametrize("method", [Sensitivity(), Interval(), Crown()], ids=str)
def test_softplus_of_a_large_input_keeps_its_last_digits(method):
    """φ(20.5) − 20.5 = log(1 + e^−20.5) = 1.25e-9, which torch's own function leaves out."""
    one = matrix(1.0)
    space = StateSpace(0 * one, one, one, b_y=torch.tensor([-20.5], dtype=F64), blocks=SOFTPLUS)
    found = certify.output_bounds(space, Box(20.5 * one, 20.5 * one), method)
    exact = float(np.log1p(np.exp(LONG(-20.5))))
    assert float(found.lower) <= exact <= float(found.upper)
    assert float(found.upper - found.lower) < 1e-11


@pytest.mark.parametrize("method", [Sensitivity(), Interval(), Crown()], ids=str)
def test_a_product_that_underflows_is_not_zero(method):
    """y = 1e-200 · 1e-200 > 0."""
    one = matrix(1.0)
    for space in (StateSpace(0 * one, 1e-200 * one, one, blocks=IDENTITY), StateSpace.affine(1e-200 * one)):
        found = certify.output_bounds(space, Box(1e-200 * one, 1e-200 * one), method)
        assert 0 < float(found.upper) < 1e-290


def test_the_program_needs_a_positive_multiplier():
    """x = relu(2x + u) has no solution for u > 0, and a Λ < 0 that makes the matrix definite proves nothing."""
    with pytest.raises(ArgumentError, match="lipschitz_sdp: expected a Λ with positive entries, got -"):
        certify.lipschitz_sdp(StateSpace(matrix(2.0), matrix(1.0), matrix(1.0)))


@pytest.mark.parametrize("room", [0.5, 1e-2, 1e-3])
def test_the_program_of_a_loop_near_one(room):
    """y = u/(1 − a) for u > 0, of which 2Λ(1 − a) keeps few digits."""
    a = 1 - room
    exact = 1 / (1 - Fraction(a))
    found = certify.lipschitz_sdp(StateSpace(matrix(a), matrix(1.0), matrix(1.0)))
    assert exact <= Fraction(found) <= exact * Fraction(1.01)
