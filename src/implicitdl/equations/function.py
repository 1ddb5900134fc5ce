"""The user's f on states of any shape, or on tuples of them, as a map of rows; a coupled batch as one row."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from itertools import accumulate
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._internal.context import autocast_dtype
from .contract import Contract
from .frozen import Frozen
from .map import LinearMap, Map

State: TypeAlias = Tensor | tuple[Tensor, ...]


class FunctionMap(Map):
    """x ↦ f(x, \\*args) on rows, one a sample.

    Where f closes over data of the whole batch, it cannot take some of the samples.  Its first failure to do so shows
    it: from then on f is given the whole batch, in which the samples that have left stand still.

    Arguments:
        who: the caller, for errors.
        f: ``f(x, *args)``.
        like: a state, for its shapes.
        args: tensors (batch, ...).
        independent: the user's promise that no sample influences another, so that nobody looks.
        root: f is −g of a root problem g(x, *args) = 0.
    """

    def __init__(
        self,
        who: str,
        f: Callable[..., State] | Frozen,
        like: State,
        args: tuple[Tensor, ...],
        independent: bool = False,
        root: bool = False,
    ) -> None:
        self._args, self.independent = args, independent
        self._f = f if isinstance(f, Frozen) else Frozen(f)
        self._contract = Contract(who)
        self.root = root
        parts = like if isinstance(like, tuple) else (like,)
        self._shapes = [part.shape[1:] for part in parts]
        self._build: Callable[..., Any] | None = None  # of a NamedTuple, f is given one
        if isinstance(like, tuple):
            self._build = getattr(like, "_make", tuple)
            ends = list(accumulate(prod(shape) for shape in self._shapes))
            self.parts = (
                tuple(slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)) if len(parts) > 1 else None
            )
        self.precision = autocast_dtype(parts[0].device)
        # The whole batch as it was last evaluated, and the places of these rows in it, until f has taken fewer.
        self._last: Tensor | None = None
        self._whole: tuple[FunctionMap, Tensor, Tensor] | None = None
        self._divisible = True

    def __call__(self, x: Tensor, /) -> Tensor:
        self._last = x.detach()  # without its graph, which may hold these rows
        if self._whole is None:
            return self._evaluate(x)
        if self._divisible:
            try:
                fx = self._evaluate(x)
            except Exception:  # whatever f raises: if it is not for the lack of samples, it raises it once more
                self._divisible = False
            else:
                self._whole = None
                return fx
        whole, batch, places = self._whole
        return whole._evaluate(batch.to(x.dtype).index_copy(0, places, x)).index_select(0, places)

    def _evaluate(self, rows: Tensor) -> Tensor:
        return self.rows(self._contract(self._f, self.state(rows), self._args))

    def take(self, rows: Tensor) -> FunctionMap | None:
        if not (self._args and self._divisible and self._f.divisible):
            return None
        part = copy(self)
        part._args = tuple([arg.index_select(0, rows) for arg in self._args])
        part._whole = None if self._last is None else (self, self._last, rows)
        part._last = None
        return part

    def rows(self, x: State) -> Tensor:
        if isinstance(x, Tensor):
            return x.reshape(len(x), -1)
        flat = [part.reshape(len(part), -1) for part in x]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def state(self, rows: Tensor) -> State:
        if self._build is None:
            return rows.view(-1, *self._shapes[0])
        parts = rows.split([prod(shape) for shape in self._shapes], 1)
        state: State = self._build([part.reshape(-1, *shape) for part, shape in zip(parts, self._shapes, strict=True)])
        return state

    def commit_buffers(self, x: Tensor) -> None:
        """The solve is over: running statistics inside f take the values of an evaluation at its solution x."""
        last = self._last
        if self._f.buffered and not (last is not None and last.dtype == x.dtype and torch.equal(last, x)):
            with torch.no_grad():  # the last evaluation judged a claim, or was beyond the best iterate
                self(x.detach())
        self._f.settle()


class OneRow(Map):
    """A map of rows on one row that holds them all: the map of a batch that has one fixed point, and not one a sample.

    Where samples influence one another, the Jacobian has blocks between them, and a sample that has converged moves on
    with the others.

    Arguments:
        f: the map of ``samples`` rows.
        samples: how many rows it maps.
    """

    def __init__(self, f: Map, samples: int) -> None:
        self.f, self.samples = f, samples
        self.check_interval, self.precision, self.root = f.check_interval, f.precision, f.root
        if f.parts is not None:  # the columns of each part are those of every sample
            columns = torch.arange(samples * f.parts[-1].stop, device="cpu").view(samples, -1)  # type: ignore[union-attr]
            self.parts = tuple(columns[:, part].flatten() for part in f.parts)

    @staticmethod
    def of(f: Map, samples: int) -> OneRow:
        return _LinearOneRow(f, samples) if isinstance(f, LinearMap) else OneRow(f, samples)

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.together(self.f(self.apart(x)))

    def together(self, rows: Tensor) -> Tensor:
        return rows.reshape(1, -1)

    def apart(self, row: Tensor) -> Tensor:
        return row.view(self.samples, -1)

    def rows(self, x: State) -> Tensor:
        return self.together(self.f.rows(x))

    def state(self, rows: Tensor) -> State:
        state: State = self.f.state(self.apart(rows))
        return state

    def commit_buffers(self, x: Tensor) -> None:
        assert isinstance(self.f, FunctionMap), "of a map of the user's"
        self.f.commit_buffers(self.apart(x))


class _LinearOneRow(OneRow, LinearMap):
    """The same of a linear map."""

    f: LinearMap

    @property
    def constant(self) -> Tensor:  # type: ignore[override]
        return self.together(self.f.constant)

    def product(self, v: Tensor) -> Tensor:
        return self.together(self.f.product(self.apart(v)))

    def divided(self, unit: Tensor) -> LinearMap:
        return _LinearOneRow(self.f.divided(unit), self.samples)


def function_map(
    who: str,
    f: Callable[..., State],
    like: State,
    args: tuple[Tensor, ...],
    coupled: bool | None = None,
    root: bool = False,
) -> FunctionMap | OneRow:
    """f as a map of rows: one row for the whole batch where it is coupled, or normalises by statistics of the batch.

    Arguments:
        who, f, like, args, root: as for `FunctionMap`.
        coupled: whether samples influence one another; None looks for batch norm in training, and False promises
            that they do not.
    """
    frozen = f if isinstance(f, Frozen) else Frozen(f)
    rows = FunctionMap(who, frozen, like, args, coupled is False, root)
    if coupled is None:
        coupled = frozen.look(lambda: rows(rows.rows(like)))
    return OneRow(rows, len(like[0] if isinstance(like, tuple) else like)) if coupled else rows
