"""The rules of linear layers, each one a sparse matrix, and the entries of an image that each window sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..matrices import coo
from .affine import Affine, NoFormError

Rule = Callable[..., Any]


def linear(input: Affine, weight: Tensor, bias: Tensor | None = None) -> Affine:
    """Wv + b along the last dimension."""
    _same_everywhere(weight, bias)
    *outer, width = input.features
    count, height = math.prod(outer), weight.shape[0]
    device = input.device
    many = torch.arange(count, device=device).reshape(-1, 1, 1)
    rows = many * height + torch.arange(height, device=device).unsqueeze(1)
    columns = many * width + torch.arange(width, device=device)
    L = _matrix(rows, columns, weight, (count * height, count * width))
    return input.applied(L, None if bias is None else bias.repeat(count), (*outer, height))


def conv(dims: int) -> Rule:
    """Of images with so many dimensions."""

    def rule(
        input: Affine,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Affine:
        _same_everywhere(weight, bias)
        _, sizes = image(input, dims)
        kernel, stride, dilation = weight.shape[2:], per_axis(stride, dims), per_axis(dilation, dims)
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if padding == "same":  # the odd one of the padding goes behind
            before, both = [span // 2 for span in spans], spans
        else:
            before = list(per_axis(0 if padding == "valid" else padding, dims))
            both = [2 * pad for pad in before]
        counts = [(s + b - t - 1) // j + 1 for s, b, t, j in zip(sizes, both, spans, stride, strict=True)]
        L = _correlation(weight, sizes, counts, stride, before, dilation, groups)
        return input.applied(L, _by_channel(bias, counts), (weight.shape[0], *counts))

    return rule


def conv_transpose(dims: int) -> Rule:
    """The transpose of the convolution with the same options, from images of the size of its own results."""

    def rule(
        input: Affine,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Affine:
        _same_everywhere(weight, bias)
        _, counts = image(input, dims)
        stride, before, dilation, behind = (per_axis(o, dims) for o in (stride, padding, dilation, output_padding))
        sizes = [
            (i - 1) * j - 2 * b + d * (k - 1) + o + 1
            for i, j, b, d, k, o in zip(counts, stride, before, dilation, weight.shape[2:], behind, strict=True)
        ]
        L = _correlation(weight, sizes, counts, stride, before, dilation, groups)
        return input.applied(L.t().coalesce(), _by_channel(bias, sizes), (groups * weight.shape[1], *sizes))

    return rule


def _correlation(
    weight: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Row (o, i), column (c, place δ of window i), entry W[o, c, δ], for images of these sizes and so many windows."""
    axes = [axis(*each) for each in zip(counts, weight.shape[2:], stride, before, dilation, strict=True)]
    seen = windows(axes, sizes).to(weight.device)
    out, inside = weight.shape[0], weight.shape[1]
    o = torch.arange(out, device=weight.device)
    channel = (o // (out // groups) * inside).unsqueeze(1) + torch.arange(inside, device=weight.device)
    place = seen + channel[:, :, None, None] * math.prod(sizes)  # (out, in, window, place)
    i = torch.arange(len(seen), device=weight.device).unsqueeze(1)
    rows = o.reshape(-1, 1, 1, 1) * len(seen) + i
    columns = torch.where(seen >= 0, place, -1)
    values = weight.reshape(out, inside, 1, -1)
    return _matrix(rows, columns, values, (out * len(seen), groups * inside * math.prod(sizes)))


def _by_channel(bias: Tensor | None, sizes: Sequence[int]) -> Tensor | None:
    return None if bias is None else bias.repeat_interleave(math.prod(sizes))


def pooling(counts: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1) -> list[Tensor]:
    """The axes of a pooling with torch's options, which gives so many outputs along each."""
    dims = len(counts)
    kernel = per_axis(kernel_size, dims)
    step = per_axis(stride, dims) if stride not in (None, [], ()) else kernel
    pad, dilations = per_axis(padding, dims), per_axis(dilation, dims)
    return [axis(*each) for each in zip(counts, kernel, step, pad, dilations, strict=True)]


def image(input: Affine, dims: int) -> tuple[int, tuple[int, ...]]:
    """Channels and sizes of a batch of images with so many dimensions."""
    if len(input.features) != dims + 1:
        raise NoFormError(
            f"it takes a batch of images without channels, {tuple(input.shape)}. Add the dimension of channels"
        )
    return input.features[0], input.features[1:]


def _matrix(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Entries that broadcast against each other; those with a negative column are left out."""
    rows, columns, values = torch.broadcast_tensors(rows, columns, values)
    kept = columns >= 0
    return coo(rows[kept], columns[kept], values[kept], shape)


def _same_everywhere(*weights: Any) -> None:
    if any(isinstance(weight, Affine) for weight in weights):
        raise NoFormError("its weights depend on the input, and a product of two values is not affine. Leave it out")


def per_axis(value: Any, dims: int) -> tuple[int, ...]:
    """An option of torch that is one integer for all axes, or one for each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values


def axis(count: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Tensor:
    """Positions along one dimension of windows at equal distances, (windows, places); those outside are padding."""
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
