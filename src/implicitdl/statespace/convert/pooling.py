"""Max-pooling by ReLU states: the larger of two is max(a, b) = b + relu(a − b), and that of many a tree of such."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...activations import RELU
from .affine import Affine, NoFormError, stacked
from .linear import adaptive_axis, image, in_channels, per_axis, pooling, windows


def max_pool(dims: int) -> Callable[..., Affine]:
    def rule(
        input: Affine,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Affine:
        if return_indices:
            raise NoFormError("places of maxima jump with the input. Ask for the maxima alone")
        channels, sizes = image(input, dims)
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
        zeros = torch.zeros(1, 1, *sizes, dtype=torch.float32, device="cpu")
        counts = pool(zeros, kernel_size, stride, padding, dilation, ceil_mode).shape[2:]
        seen = windows(pooling(counts, kernel_size, stride, padding, dilation), sizes)
        table = in_channels(seen, channels, math.prod(sizes)).to(input.device)
        return largest(input, table, (channels, *counts))

    return rule


def adaptive_max_pool(dims: int) -> Callable[..., Affine]:
    def rule(input: Affine, output_size: Any, return_indices: bool = False) -> Affine:
        if return_indices:
            raise NoFormError("places of maxima jump with the input. Ask for the maxima alone")
        channels, sizes = image(input, dims)
        counts = [s if c is None else c for s, c in zip(sizes, per_axis(output_size, dims), strict=True)]
        seen = windows([adaptive_axis(s, c) for s, c in zip(sizes, counts, strict=True)], sizes)
        return largest(input, in_channels(seen, channels, math.prod(sizes)).to(input.device), (channels, *counts))

    return rule


def largest(value: Affine, table: torch.Tensor, features: tuple[int, ...]) -> Affine:
    """The largest entry of every row of a table of places; −1 is no entry, as torch pads by −∞.

    A row of k entries costs k − 1 states, in ⌈log₂ k⌉ blocks, since every pair costs one and leaves one entry less.
    """
    # Entries first, so that the longest row has a pair on every level.
    table = table.gather(1, (table < 0).long().argsort(dim=1, stable=True))[:, : int((table >= 0).sum(1).max())]
    while table.shape[1] > 1:
        if table.shape[1] % 2:
            table = F.pad(table, (0, 1), value=-1)
        first, second = table[:, 0::2], table[:, 1::2]
        pair = second >= 0
        single = (first >= 0) & ~pair
        b = value.gathered(second[pair])
        larger = b.plus(value.gathered(first[pair]).plus(b, -1.0).activated(RELU))
        value = stacked([larger, value.gathered(first[single])])
        table = torch.full_like(first, -1)
        table[pair] = torch.arange(int(pair.sum()), device=table.device)
        table[single] = int(pair.sum()) + torch.arange(int(single.sum()), device=table.device)
    return value.gathered(table.reshape(features))
