"""The relative residual, by which a sample is done, and the cases in which a ratio of norms says nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .indexing import on_host, select
from .kernels import rows as kernel
from .rowmap import RowMap
from .units import InUnits

# Norms from here on have squares that are neither zero nor without digits.
_SMALLEST = {
    np.dtype(kind): float(np.sqrt(np.finfo(kind).tiny)) / np.finfo(kind).eps for kind in (np.float32, np.float64)
}


class Residual:
    """‖f(x) − x‖₂ / (atol/rtol + ‖f(x)‖₂) per row, at least in float32; inf where f(x) is not finite.

    A row that has grown until its tolerance exceeds every step it took, while its steps do not become shorter as far
    as rounding tells, shows nothing by being within it, as x + 1 does for large x.  Its residual is 1.  One that
    vanishes beside its first ‖f(x)‖ goes to 0, where there is nothing to be relative to.  Its residual is relative to
    that first size.

    Arguments:
        f: the map, for the units of its states.
        first_size: ‖f(x)‖ at the very first look, where there has been one.

    Attributes:
        outside: after a look, which rows were out of the range of their dtype's products; None if none were.
    """

    def __init__(self, f: RowMap, first_size: np.ndarray | None) -> None:
        self.first_size = first_size
        if first_size is not None and isinstance(f, InUnits):
            self.first_size = first_size / on_host(f.unit)
        self.outside: np.ndarray | None = None
        self._largest: np.ndarray | None = None  # ‖f(x) − x‖ at any look
        self._difference: Tensor | None = None

    def __call__(
        self, f: RowMap, x: Tensor, fx: Tensor, norms: tuple[Tensor, Tensor] | None, rtol: float, atol: float
    ) -> np.ndarray:
        """At x, with f(x), and ‖f(x) − x‖ and ‖f(x)‖ where somebody knows them."""
        dtype, observed = fx.dtype, getattr(f, "observed", None)
        if observed is not None:
            x, fx = observed(x), observed(fx)
        if fx.requires_grad:
            x, fx = x.detach(), fx.detach()
        if fx.dtype in (torch.bfloat16, torch.float16):
            x, fx = x.float(), fx.float()
        change, size = (norm.cpu().numpy() for norm in norms or self._norms(x, fx))
        floor: Any = atol / rtol
        if floor and isinstance(f, InUnits):
            floor = floor / on_host(f.unit)
        residual: np.ndarray = change / (size + floor if floor else size)
        smallest = _SMALLEST[size.dtype]
        self.outside = extreme = None
        if not (size.min() > smallest and (size + change).max() < np.inf):
            extreme = ~((size > smallest) & (size + change < np.inf))
            larger = np.maximum(size, change)
            outside = extreme & ~((larger > smallest) & (larger < np.inf))
            floors = floor[extreme] if isinstance(floor, np.ndarray) else floor
            figures = _scaled_figures(select(x, extreme), select(fx, extreme), floors)
            residual[extreme], size[extreme], change[extreme] = figures
            # A subnormal state has lost the digits that other units would show: plain steps, the ones left when every
            # product is 0, end where its rounding lets them, and no other do.
            self.outside = outside & (np.maximum(size, change) >= np.finfo(size.dtype).tiny)
        if self.first_size is None:
            self.first_size = np.where(size < np.inf, size, 0)
        elif extreme is not None or isinstance(f, InUnits):
            vanished = np.maximum(size, change) < np.finfo(size.dtype).eps ** 3 * self.first_size
            residual[vanished] = change[vanished] / self.first_size[vanished]
        self._largest = change if self._largest is None else np.maximum(self._largest, change)
        if residual.min() <= rtol:
            rounding = 4 * torch.finfo(dtype).eps * size
            outgrown = (
                (size > 2 * self.first_size)
                & (rtol * (size + floor) > self._largest)
                & (change + rounding > 0.5 * self._largest)
            )
            residual[outgrown] = np.maximum(residual[outgrown], 1)
        return residual

    def take(self, live: np.ndarray) -> None:
        """Go on with some of the rows."""
        self.first_size, self._largest = (
            None if figures is None else figures[live] for figures in (self.first_size, self._largest)
        )

    def _norms(self, x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor]:
        known = kernel.norms(x, fx)
        if known is not None:
            return known
        # On a large state a fresh tensor costs several times the subtraction that fills it.
        if self._difference is None or self._difference.shape != fx.shape:
            self._difference = torch.empty_like(fx)
        torch.sub(fx, x, out=self._difference)
        return torch.linalg.vector_norm(self._difference, dim=1), torch.linalg.vector_norm(fx, dim=1)


def _scaled_figures(x: Tensor, fx: Tensor, floor: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual, ‖f(x)‖ and ‖f(x) − x‖ of rows that are too small or too large to be squared, by their largest entry."""
    x, fx = x.double(), fx.double()
    unit = torch.maximum(fx.abs(), x.abs()).amax(dim=1).clamp(min=torch.finfo(fx.dtype).tiny)
    finite = torch.isfinite(fx).all(dim=1)
    x, fx = x / unit.unsqueeze(1), fx / unit.unsqueeze(1)
    size, change = torch.linalg.vector_norm(fx, dim=1), torch.linalg.vector_norm(fx - x, dim=1)
    relative_to = size + torch.as_tensor(floor, device=unit.device) / unit
    # Where f(x) is 0 and x is not, the next step may well end: only what is not finite is lost.
    residual = torch.where(change == 0, 0.0, change / relative_to).clamp(max=torch.finfo(torch.float32).max)
    return on_host(torch.where(finite, residual, torch.inf)), on_host(size * unit), on_host(change * unit)
