"""States written in terms of fewer states: what every reduction, and every permutation, amounts to."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import Block
from .matrices import coo, dense, product, take_rows

if TYPE_CHECKING:
    from .space import StateSpace


def rewritten(
    space: StateSpace, kept: Tensor, P: Tensor, Q: Tensor | None = None, c: Tensor | None = None
) -> StateSpace:
    """The model whose states x' are those kept, given that x = Px' + Qu + c on all that counts for the output.

    A' = A_k P, B' = B_k + A_k Q, b_x' = b_k + A_k c, C' = CP, D' = D + CQ, b_y' = b_y + Cc, where A_k are the rows
    that are kept.

    Arguments:
        space: the model.
        kept: (m,) distinct numbers of the states to keep, in their new order.
        P: (n, m); rows of states that do not count for what is kept are zero.
        Q: (n, p); None for zeros.
        c: (n,); None for zeros.
    """
    A, B, b_x = take_rows(space.A, kept), take_rows(space.B, kept), space.b_x[kept]
    D, b_y = space.D, space.b_y
    if Q is not None:
        B, D = B + product(A, Q), D + product(space.C, Q)
    if c is not None:
        b_x, b_y = b_x + A @ c, b_y + space.C @ c
    return space.holding(
        A=product(A, P), B=B, C=product(space.C, P), D=D, b_x=b_x, b_y=b_y, blocks=blocks_of(space, kept)
    )


def selection(space: StateSpace, kept: Tensor) -> Tensor:
    """The P, (n, m), that puts the j-th kept state in its old place, in the layout of the model."""
    ones = torch.ones(len(kept), dtype=space.dtype, device=space.device)
    P = coo(kept, torch.arange(len(kept), device=kept.device), ones, (space.n, len(kept)))
    return P if space.is_sparse else dense(P)


def blocks_of(space: StateSpace, kept: Tensor) -> tuple[Block, ...]:
    """The blocks of the states that are kept: runs of states that come from the same one."""
    numbers = block_numbers(space)[kept].tolist()
    return tuple(Block(space.blocks[k].activation, len(list(run))) for k, run in groupby(numbers))


def block_numbers(space: StateSpace) -> Tensor:
    """(n,) the block that each state belongs to."""
    numbers = [k for k, size in enumerate(space.sizes) for _ in range(size)]
    return torch.tensor(numbers, dtype=torch.int64, device=space.device)
