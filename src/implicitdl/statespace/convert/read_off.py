"""The one rule of what is affine: its matrix is read off by applying it to a basis, and tried on other values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from ..matrices import coo, linear
from .affine import ROUNDING, Affine, Network, NoFormError, stacked

Function = Callable[..., Any]

# Entries of a block of the basis, or of what becomes of it: 32 MiB in float64.
_BLOCK = 2**22


def samples(features: tuple[int, ...], count: int, like: Tensor, seed: int) -> Tensor:
    """(count, \\*features) of values at which branches part: of both signs, of several sizes, sparse, and zeros."""
    g = torch.Generator("cpu").manual_seed(seed)
    normal = torch.randn(count, *features, generator=g, dtype=torch.float64, device="cpu")
    few = torch.rand(normal.shape, generator=g, dtype=torch.float64, device="cpu") < 0.2
    kinds = (normal, -normal.abs(), normal.abs(), 30 * normal, normal / 100, normal * few, 0 * normal)
    chosen = torch.stack([kinds[k % len(kinds)][k] for k in range(count)])
    return chosen.to(dtype=like.dtype, device=like.device)


def affine(function: Function, *args: Any, **kwargs: Any) -> Affine:
    """An operation that is affine in all its arguments that depend on the input together."""
    values: list[Affine] = []
    map_aggregate((args, kwargs), lambda leaf: values.append(leaf) if isinstance(leaf, Affine) else None)
    whole = stacked(values)
    sizes, shapes = [len(value.c) for value in values], [value.features for value in values]

    def run(flat: Tensor, constant: Function = lambda tensor: tensor) -> Tensor:
        parts = iter([p.reshape(len(flat), *s) for p, s in zip(flat.split(sizes, 1), shapes, strict=True)])

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Affine):
                return next(parts)
            return constant(leaf) if isinstance(leaf, Tensor) else leaf

        return _result(function(*map_aggregate(args, fill), **map_aggregate(kwargs, fill)), len(flat))

    return _read_off(whole, run)


def plane_by_plane(function: Function, input: Affine, *args: Any, **kwargs: Any) -> Affine:
    """An operation on images that is affine and does the same to every channel: the matrix of one is that of all."""
    channels, *sizes = input.features

    def run(flat: Tensor) -> Tensor:
        return _result(function(flat.reshape(len(flat), 1, *sizes), *args, **kwargs), len(flat))

    L, c, shape = _matrix_of(math.prod(sizes), input.net, run)
    i, j = L.indices()
    many = torch.arange(channels, device=input.device).unsqueeze(1)
    whole = coo(
        (i + L.shape[0] * many).reshape(-1),
        (j + L.shape[1] * many).reshape(-1),
        L.values().repeat(channels),
        (channels * L.shape[0], channels * L.shape[1]),
    )
    return input.applied(whole, c.repeat(channels), (channels, *shape[1:]))


def moves(function: Function, *args: Any, **kwargs: Any) -> Affine:
    """An operation that moves entries about, and perhaps puts zeros between them."""
    values: list[Affine] = []

    def numbered(leaf: Any) -> Any:
        if not isinstance(leaf, Affine):
            return leaf
        values.append(leaf)
        return (leaf.numbers() + 1).double()  # zero is left for zeros; exact up to 2⁵³

    moved = function(*map_aggregate(args, numbered), **map_aggregate(kwargs, numbered))
    (value,) = values
    return value.moved(moved.long() - 1)


def _read_off(value: Affine, run: Function) -> Affine:
    """The function of a value's flattened samples, applied to it."""
    L, c, shape = _matrix_of(len(value.c), value.net, run)
    trial = samples((len(value.c),), value.net.batch, value.net.like, seed=2)
    with torch.no_grad():
        found = linear(trial, L, c)
        expected = run(trial).reshape(found.shape)
        size = max(1.0, float(expected.abs().max()), float(trial.abs().max()))
        if not bool(((found - expected).abs() <= ROUNDING * torch.finfo(trial.dtype).eps * size).all()):
            raise NoFormError("it is not affine in the values that depend on the input. Leave it out")
    return value.applied(L, c, shape)


def _matrix_of(size: int, net: Network, run: Function) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """L, c and the shape of a sample of the results, from blocks of the basis."""
    like, batch = net.like, net.batch
    c = run(like.new_zeros(batch, size))[0]
    wide = max(batch, min(size, _BLOCK // max(size, c.numel(), 1)))
    try:
        run(like.new_zeros(wide, size))
    except (RuntimeError, ValueError, NoFormError):  # it knows the number of samples
        wide = batch
    shape, c = tuple(c.shape), c.reshape(-1)
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    values: list[Tensor] = []
    for first in range(0, size, wide):
        count = min(wide, size - first)
        basis = torch.zeros(wide, size, dtype=like.dtype, device=like.device)
        basis[:, first : first + count].fill_diagonal_(1)
        block = run(basis)[:count].reshape(count, -1) - c
        filled = block.detach().abs() > torch.finfo(like.dtype).eps * c.detach().abs()
        if block.requires_grad:  # an entry that is zero by chance has a gradient too
            zero = run(0 * basis, _other)[:count].reshape(count, -1)
            filled |= run(basis, _other)[:count].reshape(count, -1).detach() != zero.detach()
        j, i = filled.nonzero(as_tuple=True)
        rows, columns, values = [*rows, i], [*columns, j + first], [*values, block[j, i]]
    return coo(torch.cat(rows), torch.cat(columns), torch.cat(values), (len(c), size)), c, shape


def _other(constant: Tensor) -> Tensor:
    """A constant of other entries, when it has a gradient."""
    return torch.rand_like(constant) + 1 if constant.requires_grad else constant


def _result(found: Any, batch: int) -> Tensor:
    if not isinstance(found, Tensor) or found.dim() == 0 or len(found) != batch:
        raise NoFormError("its result does not keep the samples apart. Leave the first dimension to the batch")
    return found
