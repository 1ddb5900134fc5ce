"""The door of ``sweeps.c``: x = φ(xAᵀ + b) by Picard with Aitken steps, each row to its own tolerance, in one call."""

from __future__ import annotations

import ctypes
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .build import address, library, reachable, threads

RELU, LEAKY_RELU, IDENTITY, HARDTANH, SLOPE = range(5)
SLOW, DONE, STRANGE = range(3)


class _Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("rtol", "atol", "smallest", "longest", "fast")),
        *((name, ctypes.c_int32) for name in ("budget", "period", "patience")),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_ssize_t) for name in ("n", "batch", "row", "column")),
        *((name, ctypes.c_void_p) for name in ("A", "b", "x0", "scaled", "scale", "slope", "x", "slope_at")),
        *((name, ctypes.c_void_p) for name in ("residual", "steps", "status", "settings")),
        ("radius", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("phi", "threads")),
    )


class SweptFigures:
    """What the loop says of every row, in the bytes that it wrote: tensors are made of them when somebody looks."""

    trace = None

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        self._batch, self._dtype = batch, dtype
        self._bytes = bytearray(17 * batch)  # steps, residuals, statuses

    def addresses(self) -> tuple[int, int, int]:
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))
        return at, at + 8 * self._batch, at + 16 * self._batch

    @cached_property
    def steps(self) -> Tensor:
        return self._column(0, np.int64)

    @cached_property
    def residual(self) -> Tensor:
        return self._column(8, np.float32 if self._dtype == torch.float32 else np.float64)

    @cached_property
    def converged(self) -> Tensor:
        """Where every row is done: then the statuses are truth values."""
        return self._column(16, np.bool_)

    @property
    def status(self) -> Tensor:
        """`Status.CONVERGED`, where every row is done."""
        return torch.zeros(self._batch, dtype=torch.int8, device="cpu")

    def endings(self) -> np.ndarray:
        """SLOW, DONE or STRANGE."""
        return self._column(16, np.uint8).numpy()

    def _column(self, offset: int, dtype: type) -> Tensor:
        return torch.from_numpy(np.frombuffer(self._bytes, dtype, self._batch, offset * self._batch))


class Swept(NamedTuple):
    """What the loop made of every row.

    Attributes:
        x: (batch, n) the solution of a row that is done; f of the best point of one that is SLOW; else of no use.
        slope: (batch, n) φ'(xAᵀ + b) where the row is done; None of a map that is linear.
        figures: residual and steps, (batch,), and what became of it.
        unsolved: how many rows are not done.
        scaled: A and the factors (n, 1) of its rows, where the loop has made them.
    """

    x: Tensor
    slope: Tensor | None
    figures: SweptFigures
    unsolved: int
    scaled: tuple[Tensor, Tensor] | None


def sweeps(
    A: Tensor, radius: float | None, b: Tensor, x0: Tensor | None, phi: int, slope: Tensor | None,
    rtol: float, atol: float, budget: int, period: int, fast: float, patience: int,
) -> Swept | None:  # fmt: skip
    """Iterate every row until it is done or has to be left to another method; None where the loop cannot serve.

    Arguments:
        A: (n, n), of any strides.
        radius: of the ℓ1 ball onto which its rows are shrunk first; None leaves them alone.
        b, x0: (batch, n); without an x0 the start is f(0).
        phi: which φ; with SLOPE, the map is x ↦ b + (x ∘ slope)Aᵀ, and a row of b is solved in units of its size.
        rtol, atol: of ‖f(x) − x‖₂ ≤ atol + rtol ‖f(x)‖₂.
        budget: most evaluations of f for a row.
        period: sweeps from one Aitken step to the next.
        fast: the rate per sweep at which nothing is slow.
        patience: how many more sweeps a slower row may take by its measured rate.
    """
    states = [t for t in (b, x0, slope) if t is not None]
    if not reachable(A, *states):
        return None
    dtype, shape = b.dtype, b.shape
    compiled = library("sweeps", dtype)
    if compiled is None:
        return None
    # What does not fit is torch's to broadcast, or to complain of.
    if b.dim() != 2 or b.numel() == 0 or A.shape != 2 * shape[1:] or any(t.shape != shape for t in states[1:]):
        return None
    batch, n = shape
    b = b.contiguous()
    x0 = None if x0 is None else x0.contiguous()
    slope = None if slope is None else slope.contiguous()
    x, slope_at = torch.empty_like(b), torch.empty_like(b) if slope is None else None
    figures = SweptFigures(batch, dtype)
    steps, residual, status = figures.addresses()
    made = None
    if radius is not None:
        A = A.contiguous()
        # From b, because the user's default device may be another one.
        made = torch.empty_like(A), b.new_empty(n, 1)
    scaled, scale = made or (None, None)
    settings = _settings(dtype, rtol, atol, budget, period, fast, patience)
    problem = _Problem(
        n, batch, A.stride(0), A.stride(1), A.data_ptr(), b.data_ptr(), address(x0),
        address(scaled), address(scale), address(slope),
        x.data_ptr(), address(slope_at), residual, steps, status,
        ctypes.addressof(settings), radius or 0.0, phi, threads(batch * n * n),
    )  # fmt: skip
    unsolved = compiled.solve(ctypes.byref(problem))
    return None if unsolved < 0 else Swept(x, slope_at, figures, unsolved, made)


@lru_cache(maxsize=32)
def _settings(
    dtype: torch.dtype, rtol: float, atol: float, budget: int, period: int, fast: float, patience: int
) -> _Settings:
    return _Settings(rtol, atol, *_LIMITS[dtype], fast**period, min(budget, _MOST_STEPS), period, patience)


_MOST_STEPS = (1 << 31) - 1  # as the loop counts

# Norms from the first figure on have squares that are neither zero nor without digits; the second is eps^-½.
_LIMITS = {
    dtype: (float(np.sqrt(info.tiny) / info.eps), float(info.eps**-0.5))
    for dtype, info in ((d, torch.finfo(d)) for d in (torch.float32, torch.float64))
}
