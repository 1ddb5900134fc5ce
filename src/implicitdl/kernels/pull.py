"""The door of ``pull.c``: the cotangents of A and b that a cotangent of x = φ(xAᵀ + b) makes, in one call."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .build import library, reachable, threads

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
    given = [t for t in (v, slope, x, source, scale) if t is not None]
    if not reachable(*given) or v.dim() != 2 or not v.shape == slope.shape == x.shape:
        return None
    batch, n = v.shape
    if [t.shape for t in given[3:]] not in ([], [(n, n), (n, 1)]):
        return None
    compiled = _typed(v.dtype) if batch * n * n < _LARGE else None
    if compiled is None:
        return None
    given = [t.contiguous() for t in given]  # held until C has read them
    pointers = [t.data_ptr() for t in given] + [None] * (5 - len(given))
    w, out = torch.empty_like(given[0]), v.new_empty(n, n)
    done = compiled.pull(*pointers, w.data_ptr(), out.data_ptr(), batch, n, radius, threads(batch * n * n))
    return (out, w) if done else None


@functools.cache
def _typed(dtype: torch.dtype) -> ctypes.CDLL | None:
    compiled = library("pull", dtype)
    if compiled is not None:
        compiled.pull.argtypes = (*[ctypes.c_void_p] * 7, *[ctypes.c_ssize_t] * 2, ctypes.c_double, ctypes.c_int)
    return compiled
