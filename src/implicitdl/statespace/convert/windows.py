"""Which entries of an image each window of a convolution or a pooling sees.

An axis is a matrix (windows, places) of positions along one dimension; those outside of the image stand for padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def per_axis(value: Any, dims: int) -> tuple[int, ...]:
    """An option of torch that is one integer for all axes, or one for each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values


def axis(count: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Tensor:
    """Windows at equal distances."""
    first = torch.arange(count, device="cpu") * stride - padding
    return first.unsqueeze(1) + torch.arange(kernel, device="cpu") * dilation


def adaptive_axis(size: int, count: int) -> Tensor:
    """Windows from ⌊i·size/count⌋ to ⌈(i + 1)·size/count⌉, of nearly equal lengths; the rest of a row is outside."""
    number = torch.arange(count, device="cpu")
    first, last = number * size // count, -(-(number + 1) * size // count)
    places = first.unsqueeze(1) + torch.arange(int((last - first).max()), device="cpu")
    return places.masked_fill(places >= last.unsqueeze(1), -1)


def windows(axes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """(windows, places): the places in the flattened image of these sizes; −1 outside of it."""
    flat = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    for positions, size in zip(axes, sizes, strict=True):
        inside = (positions >= 0) & (positions < size)
        both = (flat >= 0)[:, None, :, None] & inside[None, :, None, :]
        place = flat[:, None, :, None] * size + positions[None, :, None, :]
        flat = place.where(both, -1).reshape(both.shape[0] * both.shape[1], -1)
    return flat


def in_channels(image: Tensor, channels: int, size: int) -> Tensor:
    """The windows of one channel, repeated in every channel of an image with so many places."""
    offsets = size * torch.arange(channels, device=image.device).reshape(-1, 1, 1)
    return torch.where(image >= 0, image + offsets, -1).reshape(-1, image.shape[1])
