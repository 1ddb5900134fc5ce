"""f on states of any shape, or on tuples of them, as a map of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._internal.context import autocast_dtype
from .contract import Contract
from .frozen import Frozen

State: TypeAlias = Tensor | tuple[Tensor, ...]


class RowsOf:
    """x ↦ f(x, \\*args) on rows, one a sample.

    Where f closes over data of the whole batch, it cannot take some of the samples.  That is found out by its first
    failure to: from then on it is given the whole batch, the samples that have left in the state in which they did.

    Arguments:
        who: the caller, for errors.
        f: ``f(x, *args)``.
        like: a state, for its shapes.
        args: tensors (batch, ...).
        independent: the promise that no sample influences another, which is not looked at then.
        contract: what f is held to in the solve that these rows are part of; one of their own when left out.

    Attributes:
        precision: that of autocast, under which values of float32 have fewer digits than they show; None outside.
    """

    check_interval = 1  # nothing is known of f: it may cost far more than a look at the residual

    def __init__(
        self,
        who: str,
        f: Callable[..., State] | Frozen,
        like: State,
        args: tuple[Tensor, ...],
        independent: bool = False,
        part_of: _PartOf | None = None,
        contract: Contract | None = None,
    ) -> None:
        self._who, self._args, self.independent = who, args, independent
        self._part_of = part_of
        self._divisible = True
        self._last: Tensor | None = None
        self._f = f if isinstance(f, Frozen) else Frozen(f)
        # Whether f is −g of a root problem, and not a map with a fixed point.
        self.root = self._f.root
        self._contract = Contract(who) if contract is None else contract
        self._build: Callable[..., Any] | None = None  # of a NamedTuple, f is given one
        if isinstance(like, tuple):
            self._build = getattr(like, "_make", tuple)
        parts = like if isinstance(like, tuple) else (like,)
        self._shapes = [part.shape[1:] for part in parts]
        self.precision = autocast_dtype(parts[0].device)

    def __call__(self, rows: Tensor) -> Tensor:
        self._last = rows.detach()  # without its graph, which may hold these rows
        if self._part_of is None:
            return self._evaluate(rows)
        if self._divisible:
            try:
                fx = self._evaluate(rows)
            except Exception:  # whatever f raises: if it is not for the lack of samples, it raises it once more
                self._divisible = False
            else:
                self._part_of = None
                return fx
        return self._part_of(rows)

    def _evaluate(self, rows: Tensor) -> Tensor:
        return self._pack(self._contract(self._f, self.leave(rows), self._args))

    def take(self, rows: Tensor) -> RowsOf | None:
        if not (self._args and self._divisible and self._f.divisible):
            return None
        part_of = None if self._last is None else _PartOf(self._evaluate, self._last, rows)
        parts = tuple(rows.new_empty((0, *shape)) for shape in self._shapes)
        args = tuple(arg.index_select(0, rows) for arg in self._args)
        like = self._build(parts) if self._build else parts[0]
        return RowsOf(self._who, self._f, like, args, self.independent, part_of, self._contract)

    @property
    def parts(self) -> tuple[slice, ...] | None:
        """The columns of each part of the state; None where it has one."""
        if len(self._shapes) == 1:
            return None
        sizes = [prod(shape) for shape in self._shapes]
        return tuple(slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True))

    def enter(self, x: State) -> Tensor:
        return self._pack(x if isinstance(x, tuple) else (x,))

    def leave(self, rows: Tensor) -> State:
        if self._build is None:
            return rows.view(-1, *self._shapes[0])
        parts = rows.split([prod(shape) for shape in self._shapes], 1)
        state: State = self._build(part.reshape(-1, *shape) for part, shape in zip(parts, self._shapes, strict=True))
        return state

    def settle(self) -> None:
        """The solve is over: f's running statistics are those of its last evaluation."""
        self._f.settle()

    def _pack(self, parts: tuple[Tensor, ...]) -> Tensor:
        flat = [part.reshape(part.shape[0], -1) for part in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


@dataclass(frozen=True)
class _PartOf:
    """Some rows of a map of the whole batch, the others standing still."""

    whole: Callable[[Tensor], Tensor]
    others: Tensor
    places: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        batch = self.others.to(rows.dtype).index_copy(0, self.places, rows)
        return self.whole(batch).index_select(0, self.places)


class OneRow:
    """A map of rows on one row that holds them all: the map of a batch that has one fixed point, and not one a sample.

    Where samples influence one another, the Jacobian has blocks between them, and a sample that has converged moves on
    with the others.

    Arguments:
        f: the map of ``samples`` rows.
        samples: how many rows it maps.
    """

    def __init__(self, f: Any, samples: int) -> None:
        self.f, self.samples = f, samples
        self.check_interval: int = f.check_interval
        self.precision: torch.dtype | None = f.precision
        self.root, self.linear = bool(getattr(f, "root", False)), bool(getattr(f, "linear", False))

    @property
    def parts(self) -> tuple[Tensor, ...] | None:
        """The columns of each part of the state, which are those of every sample."""
        parts = getattr(self.f, "parts", None)
        if parts is None:
            return None
        columns = torch.arange(self.samples * parts[-1].stop, device="cpu").view(self.samples, -1)
        return tuple(columns[:, part].flatten() for part in parts)

    @property
    def constant(self) -> Tensor:
        """Of a linear map, its value at 0."""
        return self.together(self.f.constant)

    def product(self, row: Tensor) -> Tensor:
        """Of a linear map, its product with a row."""
        return self.together(self.f.product(self.apart(row)))

    def __call__(self, row: Tensor) -> Tensor:
        return self.together(self.f(self.apart(row)))

    def take(self, rows: Tensor) -> None:
        """One row is not divided."""

    def together(self, rows: Tensor) -> Tensor:
        return rows.reshape(1, -1)

    def apart(self, row: Tensor) -> Tensor:
        return row.view(self.samples, -1)

    def enter(self, x: State) -> Tensor:
        return self.together(self.f.enter(x))

    def leave(self, row: Tensor) -> State:
        state: State = self.f.leave(self.apart(row))
        return state

    def settle(self) -> None:
        self.f.settle()


def rows_of(
    who: str, f: Callable[..., State], like: State, args: tuple[Tensor, ...], coupled: bool | None = None
) -> RowsOf | OneRow:
    """f as a map of rows: one for the whole batch where it is coupled, or normalises by statistics of the batch.

    Arguments:
        who, f, like, args: as for `RowsOf`.
        coupled: whether samples influence one another; None looks for batch norm in training, and False promises
            that they do not.
    """
    frozen = f if isinstance(f, Frozen) else Frozen(f)
    rows = RowsOf(who, frozen, like, args, independent=coupled is False)
    if coupled is None:
        coupled = frozen.look(lambda: rows(rows.enter(like)))
    return OneRow(rows, len(like[0] if isinstance(like, tuple) else like)) if coupled else rows
