"""f on states of any shape, or on tuples of them, as a map of rows."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._checks import wrong
from ._context import autocast_dtype
from .frozen import Frozen

State: TypeAlias = Tensor | tuple[Tensor, ...]


class RowsOf:
    """x ↦ f(x, \\*args) on rows: one a sample, or one for the whole batch where f couples its samples.

    A coupled map (batch norm in training) has one fixed point for the batch and not one a sample: its Jacobian has
    blocks between samples, and a sample that has converged moves on with the others.

    Arguments:
        who: the caller, for errors.
        f: ``f(x, *args)``.
        like: a state, for its shapes.
        args: tensors (batch, ...).

    Attributes:
        samples: how many samples the one row of a coupled map holds; None where every sample has its own.
        precision: that of autocast, under which values of float32 have fewer digits than they show; None outside.
    """

    check_interval = 1  # nothing is known of f: it may cost far more than a look at the residual

    def __init__(self, who: str, f: Callable[..., State] | Frozen, like: State, args: tuple[Tensor, ...]) -> None:
        self._who, self._args = who, args
        self._f = f if isinstance(f, Frozen) else Frozen(f)
        self._tuple = isinstance(like, tuple)
        parts = like if isinstance(like, tuple) else (like,)
        self._shapes = [part.shape[1:] for part in parts]
        self.samples = len(parts[0]) if self._f.coupled else None
        self.precision = autocast_dtype(parts[0].device)

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.is_inference():  # without a version that would tell
            rows = rows.clone()
        before = None if rows.is_inference() else rows._version
        fx: Any = self._f(self.leave(rows), *self._args)
        if before is not None and rows._version != before:
            raise wrong(
                self._who, "f to leave its argument x as it is", "an operation on it in place",
                "Write x * 2 for x.mul_(2), and ReLU() for ReLU(inplace=True) where it meets the state.",
            )  # fmt: skip
        parts = fx if isinstance(fx, tuple) else (fx,)
        if not all(isinstance(part, Tensor) for part in parts):
            raise wrong(self._who, "f to return a tensor, or a tuple of them", [type(part).__name__ for part in parts])
        batch = self.samples or len(rows)
        if [part.shape for part in parts] != [(batch, *shape) for shape in self._shapes]:
            expected = [(batch, *shape) for shape in self._shapes]
            raise wrong(self._who, f"f to return shape {expected}", [tuple(part.shape) for part in parts])
        return self._pack(parts)

    def take(self, rows: Tensor) -> RowsOf | None:
        if not self._args or not self._f.divisible:
            return None
        like = tuple(rows.new_empty((0, *shape)) for shape in self._shapes)
        args = tuple(arg[rows] for arg in self._args)
        return RowsOf(self._who, self._f, like if self._tuple else like[0], args)

    def enter(self, x: State) -> Tensor:
        return self._pack(x if isinstance(x, tuple) else (x,))

    def leave(self, rows: Tensor) -> State:
        if self.samples is not None:
            rows = rows.view(self.samples, -1)
        if not self._tuple:
            return rows.view(-1, *self._shapes[0])
        sizes = [prod(shape) for shape in self._shapes]
        return tuple(part.reshape(-1, *shape) for part, shape in zip(rows.split(sizes, 1), self._shapes, strict=True))

    def settle(self) -> None:
        """The solve is over: f's running statistics are those of its last evaluation."""
        self._f.settle()

    def _pack(self, parts: tuple[Tensor, ...]) -> Tensor:
        flat = [part.reshape(part.shape[0], -1) for part in parts]
        rows = flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)
        return rows if self.samples is None else rows.reshape(1, -1)
