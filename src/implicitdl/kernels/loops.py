"""The compiled loops as functions of tensors; each is None where torch has to do the work.

Rows: scaling onto the ℓ1 ball, norms, Aitken steps, finiteness.  Products: the gradients of an equilibrium.  Sweeps: an
equilibrium, or its adjoint, solved by Picard iteration with Aitken steps, each row to its own tolerance, in one call.
"""

from __future__ import annotations

import ctypes
import functools
import os
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..solution import SolveStats
from .build import library

_DENSE = (Tensor, nn.Parameter)
# Fewer products are made before a second thread has woken up.
_WORTH_A_THREAD = 1 << 16


def threads(work: int, parts: int | None = None) -> int:
    """How many are worth having for so many multiplications, in so many parts, of those that torch may use."""
    worth = work // _WORTH_A_THREAD if parts is None else min(work // _WORTH_A_THREAD, parts)
    return 1 if _forked else max(1, min(torch.get_num_threads(), worth))


# Threads do not outlive a fork, but OpenMP would wait for them for ever.
_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def reachable(*tensors: Tensor) -> bool:
    """Whether all numbers lie in this machine's memory, in one precision, and nobody listens to what is done."""
    dtype = tensors[0].dtype
    # A tracer and a mode of dispatch see torch's operations only, and would take the results for constants.
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    for x in tensors:  # a loop, because this is asked several times a solve
        if (
            x.dtype is not dtype
            or type(x) not in _DENSE
            or not x.is_cpu
            or x.layout is not torch.strided
            or x.is_nested
            or x.is_neg()  # the imaginary part of a conjugate, with the other sign in memory
            or not torch._C._has_storage(x)  # torch.func's wrappers have none
            or (x.data_ptr() == 0 and x.numel() != 0)  # torch's own zeros, and storage that was given back
        ):
            return False
    return True


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def loops(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled loops for numbers of this dtype, with the types of their arguments."""
    compiled = library(dtype)
    if compiled is not None:
        pointer, size, real, count = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_double, ctypes.c_int
        compiled.scale_rows.argtypes = (*[pointer] * 3, size, size, real, count)
        compiled.scale_rows_vjp.argtypes = (*[pointer] * 4, size, size, real, count)
        compiled.all_finite.argtypes = (pointer, size)
        compiled.aitken.argtypes = (*[pointer] * 4, size, size, real, real, count)
        compiled.norms.argtypes = (*[pointer] * 4, size, size, count)
        compiled.pull.argtypes = (*[pointer] * 7, size, size, real, count)
    return compiled


def _loops(*tensors: Tensor) -> ctypes.CDLL | None:
    return loops(tensors[0].dtype) if reachable(*tensors) else None


def scale_rows(v: Tensor, radius: float) -> tuple[Tensor, Tensor] | None:
    """v min(1, r/‖v‖₁) by rows, and the factors (rows, 1); None where torch has to do it."""
    compiled = _loops(v)
    if compiled is None or v.dim() != 2:
        return None
    v = v.contiguous()
    scaled, scale = torch.empty_like(v), v.new_empty(len(v), 1)
    compiled.scale_rows(v.data_ptr(), scaled.data_ptr(), scale.data_ptr(), *v.shape, radius, threads(v.numel()))
    return scaled, scale


def scale_rows_vjp(v: Tensor, scale: Tensor, g: Tensor, radius: float) -> Tensor | None:
    """The vector-Jacobian product of `scale_rows` with g; None where torch has to do it."""
    compiled = _loops(v, scale, g)
    if compiled is None or v.dim() != 2 or g.shape != v.shape or scale.shape != (len(v), 1):
        return None
    v, scale, g = v.contiguous(), scale.contiguous(), g.contiguous()
    product = torch.empty_like(v)
    compiled.scale_rows_vjp(
        v.data_ptr(), scale.data_ptr(), g.data_ptr(), product.data_ptr(), *v.shape, radius, threads(v.numel())
    )
    return product


def all_finite(x: Tensor) -> bool:
    """Whether no number is infinite or NaN; also False where they sum up to infinity, where torch has to look."""
    compiled = loops(x.dtype) if reachable(x) and x.is_contiguous() else None
    if compiled is None:
        return bool(torch.isfinite(x.detach().sum()))
    return bool(compiled.all_finite(x.data_ptr(), x.numel()))


def norms(x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor] | None:
    """‖f(x) − x‖ and ‖f(x)‖ of every row; None where torch has to do it."""
    compiled = _loops(x, fx)
    if compiled is None or x.dim() != 2 or x.shape != fx.shape or not (x.is_contiguous() and fx.is_contiguous()):
        return None
    found = x.new_empty(2, len(x), dtype=torch.float64)
    change, size = found
    compiled.norms(
        x.data_ptr(), fx.data_ptr(), change.data_ptr(), size.data_ptr(), *x.shape, threads(x.numel(), len(x))
    )
    change, size = found.to(x.dtype)
    return change, size


def aitken(x: Tensor, fx: Tensor, before: Tensor, tiny: float, longest: float) -> Tensor | None:
    """The Aitken step of every row, of factors up to ``longest``; None where torch has to do it.

    Arguments:
        x, fx, before: (batch, d)  x, f(x), and the residual of the sweep before.
        tiny: below it a square is nothing to divide by.
    """
    compiled = None if torch.is_grad_enabled() else _loops(x, fx, before)
    together = x.is_contiguous() and fx.is_contiguous() and before.is_contiguous()
    if compiled is None or x.dim() != 2 or not x.shape == fx.shape == before.shape or not together:
        return None
    following = torch.empty_like(x)
    compiled.aitken(
        x.data_ptr(), fx.data_ptr(), before.data_ptr(), following.data_ptr(), *x.shape, tiny, longest,
        threads(x.numel(), len(x)),
    )  # fmt: skip
    return following


# Multiplications from which on torch's product is the faster one.
_LARGE = 1 << 21


def pull(
    v: Tensor, slope: Tensor, x: Tensor, source: Tensor | None, scale: Tensor | None, radius: float
) -> tuple[Tensor, Tensor] | None:
    """Σ w ⊗ x and w = v ∘ slope; None where torch has to do it.

    Arguments:
        v, slope, x: (batch, n).
        source, scale, radius: where the rows of A are scale · source, (n, n) and (n, 1), shrunk onto the ball of this
            radius: the product is pulled back to them.
    """
    compiled = _loops(v, slope, x, v if source is None else source, v if scale is None else scale)
    if compiled is None or v.dim() != 2 or not v.shape == slope.shape == x.shape:
        return None
    batch, n = v.shape
    if batch * n * n >= _LARGE:
        return None
    if source is not None and scale is not None:
        if source.shape != (n, n) or scale.shape != (n, 1):
            return None
        source, scale = source.contiguous(), scale.contiguous()
    v, slope, x = v.contiguous(), slope.contiguous(), x.contiguous()
    w, out = torch.empty_like(v), v.new_empty(n, n)
    done = compiled.pull(
        v.data_ptr(), slope.data_ptr(), x.data_ptr(), address(source), address(scale), w.data_ptr(), out.data_ptr(),
        batch, n, radius, threads(batch * n * n),
    )  # fmt: skip
    return (out, w) if done else None


SLOPE = 10  # of phi.h; smaller numbers are those of `activations.COMPILED`
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


class SweptStats(SolveStats):
    """What the loop says of every row, in the bytes that it wrote: tensors are made of them when somebody looks."""

    _batch: int
    _dtype: torch.dtype
    _bytes: bytearray
    address: int

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        data = bytearray(17 * batch)  # steps, residuals, statuses
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        self.__dict__.update(_batch=batch, _dtype=dtype, _bytes=data, address=address)

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

    @cached_property
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
        stats: residual and steps, (batch,), and what became of it.
        unsolved: how many rows are not done.
        scaled: A and the factors (n, 1) of its rows, where the loop has made them.
    """

    x: Tensor
    slope: Tensor | None
    stats: SweptStats
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
    compiled = _loops(A, b, b if x0 is None else x0, b if slope is None else slope)
    if compiled is None:
        return None
    shape = b.shape
    # What does not fit is torch's to broadcast, or to complain of.
    if b.dim() != 2 or b.numel() == 0 or A.shape != 2 * shape[1:]:
        return None
    if (x0 is not None and x0.shape != shape) or (slope is not None and slope.shape != shape):
        return None
    batch, n = shape
    b = b.contiguous()
    x0 = None if x0 is None else x0.contiguous()
    slope = None if slope is None else slope.contiguous()
    x, slope_at = torch.empty_like(b), torch.empty_like(b) if slope is None else None
    stats = SweptStats(batch, b.dtype)
    steps = stats.address
    made = None
    if radius is not None:
        A = A.contiguous()
        # From b, because the user's default device may be another one.
        made = torch.empty_like(A), b.new_empty(n, 1)
    scaled, scale = made or (None, None)
    settings = _settings(b.dtype, rtol, atol, budget, period, fast, patience)
    problem = _Problem(
        n, batch, A.stride(0), A.stride(1), A.data_ptr(), b.data_ptr(), address(x0),
        address(scaled), address(scale), address(slope),
        x.data_ptr(), address(slope_at), steps + 8 * batch, steps, steps + 16 * batch,
        ctypes.addressof(settings), radius or 0.0, phi, threads(batch * n * n),
    )  # fmt: skip
    unsolved = compiled.solve(ctypes.byref(problem))
    return None if unsolved < 0 else Swept(x, slope_at, stats, unsolved, made)


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
