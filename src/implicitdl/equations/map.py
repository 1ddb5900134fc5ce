"""What is iterated and linearised: maps of rows to rows, where rows are samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class RowMap(Protocol):
    """What the loop iterates: rows to rows, each row on its own."""

    #: Evaluations between two looks at the residual.  A look costs about as much as a sweep of a small model.
    check_interval: int
    # A root problem has ``root = True``, and −g(x) for its value, the residual itself.
    # A linear map of one has ``linear = True``, and its ``constant``.
    # A map of states in parts also has ``parts``, the columns of each; every part meets the tolerance by itself.

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def take(self, rows: Tensor) -> RowMap | None:
        """The same map for some of the samples; None when data hides in a closure and cannot be indexed."""


class Linearization(Protocol):
    """f at a point: its value, with the graph to the weights, and products with its Jacobian J."""

    value: Tensor

    def vjp(self, v: Tensor) -> Tensor:
        """Jᵀv, one row per sample."""

    def jvp(self, w: Tensor) -> Tensor:
        """J w, one row per sample."""

    def adjoint_map(self, g: Tensor) -> RowMap:
        """v ↦ g + Jᵀv."""

    def tangent_map(self, h: Tensor) -> RowMap:
        """w ↦ h + J w."""


@dataclass(frozen=True)
class Explicit:
    """A map as a function of its tensors, ``build(*weights, *rows)``, which is what torch.func's transforms need."""

    build: Callable[..., RowMap]
    weights: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


def check_interval(n: int) -> int:
    """Sweeps between two looks, from n alone so that when a sample stops never depends on its batch.

    A look is some twenty small operations whose price hardly depends on n; a sweep costs 2n² flops a sample.  On a
    small model a wasted sweep is the cheaper of the two, on a large one the look is.
    """
    return 4 if n <= 128 else 3 if n <= 512 else 1
