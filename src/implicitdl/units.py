"""A map of states in units of their own size: what solves ordinary numbers solves 1e-163 and 1e160 too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class InUnits:
    """y ↦ f(uy)/u, for a power of two u per sample: the same Jacobian, and not a bit of rounding.

    Everything else that f offers to solvers is offered too, in the same units.

    Arguments:
        f: the map.
        unit: (batch, 1) powers of two.
    """

    def __init__(self, f: Any, unit: Tensor) -> None:
        self.f, self.unit = f, unit
        self.check_interval: int = f.check_interval

    def __call__(self, y: Tensor) -> Tensor:
        fx: Tensor = self.f(self.leave(y))
        return self.enter(fx)

    def enter(self, x: Tensor) -> Tensor:
        return x / self.unit.to(x.dtype)

    def leave(self, y: Tensor) -> Tensor:
        return y * self.unit.to(y.dtype)

    def take(self, rows: Tensor) -> InUnits | None:
        f = self.f.take(rows)
        return None if f is None else InUnits(f, self.unit.index_select(0, rows))

    def __getattr__(self, name: str) -> Any:
        """What some maps have and others have not: maps of states, what is linear in them, and plain facts."""
        part = getattr(self.f, name)
        if name in ("observed", "affine", "inner", "prox"):
            return self._converted(part)
        if name == "linearize":
            return lambda y: _Linearization(part(self.leave(y)), self)
        return self.enter(part) if name == "b" else part

    def _converted(self, part: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda y, *settings: self.enter(part(self.leave(y), *settings))


class _Linearization:
    """f at uy: the Jacobian is that of f, the value is in units."""

    def __init__(self, at: Any, units: InUnits) -> None:
        self._at = at
        self.value = units.enter(at.value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._at, name)


def in_units(f: Any, x: Tensor, best_x: Tensor, rows: np.ndarray) -> tuple[InUnits, Tensor, Tensor]:
    """The map with the samples ``rows`` in units of their entries in x, the others as they are, and so x and best_x."""
    if isinstance(f, InUnits):
        f, x, best_x = f.f, f.leave(x), f.leave(best_x)
    largest = x.detach().abs().amax(dim=1).double().cpu().numpy()[rows]
    unit = np.ones((len(x), 1))
    # frexp is m 2^e with ½ ≤ m < 1; a sample that is zero has e = 0.
    unit[rows, 0] = np.ldexp(1.0, np.frexp(largest)[1] - 1)
    units = InUnits(f, torch.from_numpy(unit).to(x))
    return units, units.enter(x), units.enter(best_x)
