"""Two lines that hold φ between them on the interval of each pre-activation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..activations import ELU, HARDTANH, SIGMOID, SOFTPLUS, TANH, Activation
from ..statespace import StateSpace
from .domain import Box

# Their φ' rises and then falls, or does only one of the two: on an interval it is least at one of the ends.
_ONE_HUMP = (TANH, SIGMOID, HARDTANH, SOFTPLUS, ELU)


class Lines(NamedTuple):
    """low_slope z + low_offset ≤ φ(z) ≤ high_slope z + high_offset on the interval, (batch, n) each.

    Attributes:
        least, most: any slope between them, with offset 0, gives a valid lower line too; equal to ``low_slope``
            where there is no choice.
    """

    high_slope: Tensor
    high_offset: Tensor
    low_slope: Tensor
    low_offset: Tensor
    least: Tensor
    most: Tensor


def lines(space: StateSpace, z: Box) -> Lines:
    """The lines of every state; differentiable in the ends of its interval.

    Raises:
        ArgumentError: an activation for which no lines are known.
    """
    ends = zip(z.lower.split(list(space.sizes), 1), z.upper.split(list(space.sizes), 1), strict=True)
    parts = [_of(block.activation, low, high) for block, (low, high) in zip(space.blocks, ends, strict=True)]
    return Lines(*(torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))) if parts else Lines(*[z.lower] * 6)


def _of(phi: Activation, low: Tensor, high: Tensor) -> Lines:
    if phi.homogeneous:
        one = low.new_ones(())
        left, right = -float(phi.phi(-one)), float(phi.phi(one))
        if 0 <= left <= right:
            return _kink(left, right, low, high)
    elif phi in _ONE_HUMP:
        return _parallel(phi, low, high)
    known = ", ".join(["relu", "leaky_relu", "identity", *(one_hump.name for one_hump in _ONE_HUMP)])
    raise wrong("Crown", f"activations of {known}", phi.name, "Use Interval() or Sensitivity().")


def _kink(left: float, right: float, low: Tensor, high: Tensor) -> Lines:
    """φ(z) = right·z for z ≥ 0 and left·z below, convex: the chord above it, any slope between the two below.

    The slope on the side where more of the interval lies makes the smaller triangle.
    """
    across = (low < 0) & (high > 0)
    # Numbers become tensors of the interval's dtype: where() of two of them is of torch's default dtype, which may hold
    # less than float64 does of a slope such as 0.01.
    lower, upper = torch.full_like(low, left), torch.full_like(low, right)
    settled = torch.where(low >= 0, upper, lower)
    # Where nothing crosses the kink the width may be 0, and where() would still differentiate the quotient.
    width = torch.where(across, high - low, 1.0)
    chord = torch.where(across, (right * high - left * low) / width, settled)
    offset = torch.where(across, (left - chord) * low, 0.0)
    chosen = torch.where(across, torch.where(high > -low, upper, lower), settled)
    zero = torch.zeros_like(low)
    least, most = (torch.where(across, slope, settled) for slope in (lower, upper))
    return Lines(chord, offset, chosen, zero, least, most)


def _parallel(phi: Activation, low: Tensor, high: Tensor) -> Lines:
    """Two lines of slope λ = min φ' on the interval, through the ends of the graph.

    φ(high) − φ(z) = ∫φ' ≥ λ(high − z) puts the upper line through the upper end, and likewise the lower one.
    """
    slope = torch.minimum(phi.dphi(low), phi.dphi(high))
    return Lines(slope, phi.phi(high) - slope * high, slope, phi.phi(low) - slope * low, slope, slope)
