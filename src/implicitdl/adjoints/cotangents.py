"""Many cotangents of one solution at once: a backward pass under vmap, of a solve that was made outside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._internal.context import batched_by_autograd, transformed
from .._internal.errors import wrong
from .guard import FirstOrderOnly

Solve = Callable[[Tensor], Tensor]


def many(g: Tensor) -> bool:
    """Whether g may stand for many cotangents."""
    return transformed() or batched_by_autograd(g)


def each(solve: Solve, g: Tensor) -> Tensor:
    """The solve of every cotangent in g, in turn."""
    if batched_by_autograd(g):
        return _each_of_autograd(solve, g)
    solved: Tensor = _Each.apply(g, solve)
    return solved


class _Each(torch.autograd.Function):
    """The solve as torch.func's vmap takes it, first order only."""

    @staticmethod
    def forward(g: Tensor, solve: Solve) -> Tensor:
        return solve(g)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], g: Tensor, solve: Solve) -> tuple[Tensor, int]:
        return torch.stack([_Each.apply(one, solve) for one in g.unbind(in_dims[0])]), 0

    setup_context = FirstOrderOnly.setup_context
    backward = FirstOrderOnly.backward
    jvp = FirstOrderOnly.jvp


def _each_of_autograd(solve: Solve, g: Tensor) -> Tensor:
    """The same for autograd's own vmap, which knows no Functions and has no public way in and out."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    cotangents = torch._remove_batch_dim(g, level, 1, 0)
    if batched_by_autograd(cotangents):
        raise wrong("backward", "is_grads_batched once", "one inside another", "Use torch.func.vmap.")
    solved: Tensor = torch._add_batch_dim(torch.stack([solve(one) for one in cotangents]), 0, level)
    return solved
