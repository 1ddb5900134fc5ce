"""The door of ``pull.c``: the cotangents of A and b that a cotangent of x = φ(xAᵀ + b) makes, in one call."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .build import address, library, reachable, threads

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
    if v.dim() != 2 or not reachable(v, slope, x) or not v.shape == slope.shape == x.shape:
        return None
    batch, n = v.shape
    compiled = _typed(v.dtype) if batch * n * n < _LARGE else None
    if compiled is None:
        return None
    v, slope, x = v.contiguous(), slope.contiguous(), x.contiguous()
    source = None if source is None else source.contiguous()
    w, out = torch.empty_like(v), v.new_empty(n, n)
    done = compiled.pull(
        v.data_ptr(), slope.data_ptr(), x.data_ptr(), address(source), address(scale), w.data_ptr(), out.data_ptr(),
        batch, n, radius, threads(batch * n * n),
    )  # fmt: skip
    return (out, w) if done else None


@functools.cache
def _typed(dtype: torch.dtype) -> ctypes.CDLL | None:
    compiled = library("pull", dtype)
    if compiled is not None:
        compiled.pull.argtypes = (*[ctypes.c_void_p] * 7, *[ctypes.c_ssize_t] * 2, ctypes.c_double, ctypes.c_int)
    return compiled
