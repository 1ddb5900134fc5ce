"""What is bounded: affine functions of state and input, and their bounds when both lie in boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..statespace import StateSpace
from .domain import Box
from .labels import classes, score_rows


@dataclass(frozen=True, eq=False)
class Functionals:
    """cᵀx + dᵀu + e: for every sample, m of a bank of K functions.

    Many samples ask for the same few, so the bank is multiplied once and the products are picked.

    Attributes:
        c: (K, n).
        d: (K, p).
        e: (K,).
        index: (batch, m), which of the bank each sample asks for.
    """

    c: Tensor
    d: Tensor
    e: Tensor
    index: Tensor

    def __neg__(self) -> Functionals:
        return Functionals(-self.c, -self.d, -self.e, self.index)

    def upper(self, x: Box, u: Box) -> Tensor:
        """(batch, m), the largest value over states and inputs that vary freely in their boxes."""
        every = (
            x.center @ self.c.t() + x.radius @ self.c.abs().t() + u.center @ self.d.t() + u.radius @ self.d.abs().t()
        )
        return (every + self.e).gather(1, self.index)

    def magnitude(self, x: Box, u: Box) -> Tensor:
        """(batch, m), the sum of the absolute values of all terms, to which rounding is relative."""
        every = x.magnitude @ self.c.abs().t() + u.magnitude @ self.d.abs().t()
        return (every + self.e.abs()).gather(1, self.index)


def outputs(space: StateSpace, batch: int) -> Functionals:
    """y, every component for every sample."""
    return Functionals(space.C, space.D, space.b_y, _all(space.q, batch, space.b_y))


def rivals(space: StateSpace, labels: Tensor) -> Functionals:
    """s_j − s_label of the scores s of every class j: nowhere positive where the label wins."""
    q = classes(space.q)
    scores = [score_rows(M) for M in (space.C, space.D, space.b_y)]
    c, d, e = ((rows.unsqueeze(0) - rows.unsqueeze(1)).flatten(0, 1) for rows in scores)
    # Pair (label, j) stands at label·q + j.
    return Functionals(c, d, e, labels.unsqueeze(1) * q + _all(q, len(labels), space.b_y))


def pre_activations(space: StateSpace, units: Tensor) -> Functionals:
    """z_i = A_i x + B_i u + b_i for the units (batch, m)."""
    return Functionals(space.A, space.B, space.b_x, units)


def _all(size: int, batch: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device).expand(batch, size)
