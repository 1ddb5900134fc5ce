"""The rules of linear layers: each one is a sparse matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..matrices import coo
from .affine import Affine, NoFormError
from .windows import adaptive_axis, axis, in_channels, per_axis, windows

Rule = Callable[..., Any]


def linear(input: Affine, weight: Tensor, bias: Tensor | None = None) -> Affine:  # noqa: A002 (torch's name)
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
    """Of images with so many dimensions: row (o, i), column (c, place δ of window i), entry W[o, c, δ]."""

    def rule(
        input: Affine,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Affine:
        _same_everywhere(weight, bias)
        channels, sizes = image(input, dims)
        kernel, stride, dilation = weight.shape[2:], per_axis(stride, dims), per_axis(dilation, dims)
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if padding == "same":  # the odd one of the padding goes behind
            before, both = [span // 2 for span in spans], spans
        else:
            before = list(per_axis(0 if padding == "valid" else padding, dims))
            both = [2 * pad for pad in before]
        counts = [(s + b - t - 1) // j + 1 for s, b, t, j in zip(sizes, both, spans, stride, strict=True)]
        axes = [axis(*each) for each in zip(counts, kernel, stride, before, dilation, strict=True)]
        seen = windows(axes, sizes).to(input.device)
        out, inside = weight.shape[0], weight.shape[1]
        o = torch.arange(out, device=input.device)
        channel = (o // (out // groups) * inside).unsqueeze(1) + torch.arange(inside, device=input.device)
        place = seen + channel[:, :, None, None] * math.prod(sizes)  # (out, in, window, place)
        i = torch.arange(len(seen), device=input.device).unsqueeze(1)
        rows = o.reshape(-1, 1, 1, 1) * len(seen) + i
        columns = torch.where(seen >= 0, place, -1)
        values = weight.reshape(out, inside, 1, -1)
        L = _matrix(rows, columns, values, (out * len(seen), channels * math.prod(sizes)))
        return input.applied(L, None if bias is None else bias.repeat_interleave(len(seen)), (out, *counts))

    return rule


def avg_pool(dims: int) -> Rule:
    """The entries of a window have equal weights: what torch makes of an image of ones, over their number."""

    def rule(
        input: Affine,  # noqa: A002
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Affine:
        channels, sizes = image(input, dims)
        pool = F.avg_pool1d if dims == 1 else F.avg_pool2d
        divisor = () if dims == 1 else (divisor_override,)
        ones = torch.ones(1, 1, *sizes, dtype=torch.float64, device="cpu")
        mean = pool(ones, kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor)[0, 0]
        return _averaged(input, channels, sizes, pooling(mean.shape, kernel_size, stride, padding), mean)

    return rule


def adaptive_avg_pool(dims: int) -> Rule:
    def rule(input: Affine, output_size: Any) -> Affine:  # noqa: A002
        channels, sizes = image(input, dims)
        counts = [s if c is None else c for s, c in zip(sizes, per_axis(output_size, dims), strict=True)]
        axes = [adaptive_axis(s, c) for s, c in zip(sizes, counts, strict=True)]
        return _averaged(input, channels, sizes, axes, torch.ones(counts, dtype=torch.float64, device="cpu"))

    return rule


def pooling(counts: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1) -> list[Tensor]:
    """The axes of a pooling with torch's options, which gives so many outputs along each."""
    dims = len(counts)
    kernel = per_axis(kernel_size, dims)
    step = per_axis(stride, dims) if stride not in (None, [], ()) else kernel
    pad, dilations = per_axis(padding, dims), per_axis(dilation, dims)
    return [axis(*each) for each in zip(counts, kernel, step, pad, dilations, strict=True)]


def image(input: Affine, dims: int) -> tuple[int, tuple[int, ...]]:  # noqa: A002
    """Channels and sizes of a batch of images with so many dimensions."""
    if len(input.features) != dims + 1:
        raise NoFormError(
            f"it takes a batch of images without channels, {tuple(input.shape)}. Add the dimension of channels"
        )
    return input.features[0], input.features[1:]


def _averaged(value: Affine, channels: int, sizes: Sequence[int], axes: list[Tensor], mean_of_ones: Tensor) -> Affine:
    seen = windows(axes, sizes)
    weights = mean_of_ones.reshape(-1, 1) / (seen >= 0).sum(1, keepdim=True)
    columns = in_channels(seen, channels, math.prod(sizes)).to(value.device)
    rows = torch.arange(len(columns), device=value.device).unsqueeze(1)
    values = weights.to(value.net.like).repeat(channels, 1)
    L = _matrix(rows, columns, values, (len(columns), channels * math.prod(sizes)))
    return value.applied(L, features=(channels, *mean_of_ones.shape))


def _matrix(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Entries that broadcast against each other; those with a negative column are left out."""
    rows, columns, values = torch.broadcast_tensors(rows, columns, values)
    kept = columns >= 0
    return coo(rows[kept], columns[kept], values[kept], shape)


def _same_everywhere(*weights: Any) -> None:
    if any(isinstance(weight, Affine) for weight in weights):
        raise NoFormError("its weights depend on the input, and a product of two values is not affine. Leave it out")
