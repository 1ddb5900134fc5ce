"""The blocks of a state: which φ acts on which components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import IDENTITY, Activation


class Block(NamedTuple):
    """Consecutive components of the state under one activation."""

    activation: Activation
    size: int


def joined(blocks: Sequence[Block]) -> Activation:
    """φ of the whole state, (batch, n), as one record: each block's own on its components."""
    kinds = list(dict.fromkeys(block.activation for block in blocks))
    if not kinds:
        return IDENTITY
    if len(kinds) == 1:
        return kinds[0]
    return Activation(
        "+".join(kind.name for kind in kinds),
        _Piecewise(tuple(blocks), derivative=False),
        _Piecewise(tuple(blocks), derivative=True),
        (min(kind.slope[0] for kind in kinds), max(kind.slope[1] for kind in kinds)),
        all(kind.homogeneous for kind in kinds),
    )


def slopes_of(blocks: Sequence[Block], like: Tensor) -> Tensor:
    """(n,) max|φ'| of every state."""
    slopes = [block.activation.lipschitz for block in blocks for _ in range(block.size)]
    return torch.tensor(slopes, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class _Piecewise:
    """φ or φ' of every block on its columns.  It keeps the records, which can be pickled where functions cannot."""

    blocks: tuple[Block, ...]
    derivative: bool

    def __call__(self, z: Tensor) -> Tensor:
        parts = z.split([block.size for block in self.blocks], -1)
        kinds = [block.activation for block in self.blocks]
        each = [a.dphi(part) if self.derivative else a.phi(part) for a, part in zip(kinds, parts, strict=True)]
        return torch.cat(each, -1)
