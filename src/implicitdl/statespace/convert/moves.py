"""The rules of what moves entries about, and of what is made of their sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..matrices import coo
from .affine import Affine, NoFormError, stacked
from .elementwise import mul


def move(name: str) -> Callable[..., Any]:
    """A method of tensors, done to the numbers of the entries: torch itself says where each one goes."""

    def rule(input: Affine, *args: Any, **kwargs: Any) -> Any:
        moved = getattr(input.numbers(), name)(*args, **kwargs)
        return input.moved(moved) if isinstance(moved, Tensor) else tuple(input.moved(part) for part in moved)

    return rule


def dropout(input: Affine, p: float = 0.5, training: bool = True, inplace: bool = False) -> Affine:
    if training and p > 0:
        raise NoFormError("dropout in training mode is random. Give it training=self.training, and call eval() first")
    return input


def cat(tensors: Sequence[Affine | Tensor], dim: int = 0) -> Affine:
    """The numbers of the entries of all, in one."""
    net = next(value for value in tensors if isinstance(value, Affine)).net
    values = [value if isinstance(value, Affine) else net.constant(value) for value in tensors]
    whole = stacked(values)
    # (batch, all entries): the part of each value, in its shape.
    parts = whole.numbers().split([len(value.c) for value in values], 1)
    return whole.moved(torch.cat([part.reshape(v.shape) for part, v in zip(parts, values, strict=True)], dim))


def hstack(tensors: Sequence[Affine | Tensor]) -> Affine:
    return cat(tensors, 1)


def stack(tensors: Sequence[Affine], dim: int = 0) -> Affine:
    return cat([v.unsqueeze(dim) if isinstance(v, Tensor) else move("unsqueeze")(v, dim) for v in tensors], dim)


def pad(input: Affine, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Affine:
    """By zeros, by another constant, or by entries of its own."""
    places = torch.arange(len(input.c), dtype=torch.float64, device="cpu").reshape(1, *input.features)
    places = F.pad(places, list(pad), mode=mode, value=-1.0 if mode == "constant" else None)
    if len(places) != 1:
        raise NoFormError("it pads the batch. Leave the first dimension alone")
    index = places[0].long().to(input.device)
    return input.gathered(index).shifted((value or 0.0) * (index < 0).reshape(-1).to(input.net.like))


def sum(input: Affine, dim: Any = None, keepdim: bool = False) -> Affine:
    """Along dimensions of the features."""
    dims = sorted({d % input.ndim for d in ((dim,) if isinstance(dim, int) else dim or range(input.ndim))})
    if 0 in dims:
        raise NoFormError("it sums over the batch, which mixes the samples. Name the dimensions, without the first")
    kept = [1 if d + 1 in dims else size for d, size in enumerate(input.features)]
    rows = torch.arange(math.prod(kept), device=input.device).reshape(kept).expand(input.features).reshape(-1)
    columns = torch.arange(len(input.c), device=input.device)
    ones = torch.ones(len(columns), dtype=input.dtype, device=input.device)
    features = kept if keepdim else [size for d, size in enumerate(input.features) if d + 1 not in dims]
    return input.applied(coo(rows, columns, ones, (math.prod(kept), len(columns))), features=tuple(features))


def mean(input: Affine, dim: Any = None, keepdim: bool = False) -> Affine:
    total = sum(input, dim, keepdim)
    return mul(total, len(total.c) / len(input.c))
