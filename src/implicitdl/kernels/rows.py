"""The door of ``rows.c``: rows shrunk onto the ℓ1 ball, their norms, and whether all numbers are finite."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .build import library, reachable, threads


def scale_rows(v: Tensor, radius: float) -> tuple[Tensor, Tensor] | None:
    """v min(1, r/‖v‖₁) by rows, and the factors (rows, 1); None where torch has to do it."""
    compiled = _library(v)
    if compiled is None or v.dim() != 2:
        return None
    v = v.contiguous()
    scaled, scale = torch.empty_like(v), v.new_empty(len(v), 1)
    compiled.scale_rows(v.data_ptr(), scaled.data_ptr(), scale.data_ptr(), *v.shape, radius, threads(v.numel()))
    return scaled, scale


def scale_rows_vjp(v: Tensor, scale: Tensor, g: Tensor, radius: float) -> Tensor | None:
    """The vector-Jacobian product of `scale_rows` with g; None where torch has to do it."""
    compiled = _library(v, scale, g)
    if compiled is None or v.dim() != 2 or g.shape != v.shape or scale.shape != (len(v), 1):
        return None
    v, scale, g = v.contiguous(), scale.contiguous(), g.contiguous()
    product = torch.empty_like(v)
    compiled.scale_rows_vjp(
        v.data_ptr(), scale.data_ptr(), g.data_ptr(), product.data_ptr(), *v.shape, radius, threads(v.numel())
    )
    return product


def all_finite(x: Tensor) -> bool | None:
    """Whether no number is infinite or NaN; None where torch has to look."""
    compiled = _library(x)
    if compiled is None or not x.is_contiguous():
        return None
    return bool(compiled.all_finite(x.data_ptr(), x.numel()))


def norms(x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor] | None:
    """‖f(x) − x‖ and ‖f(x)‖ of every row; None where torch has to do it."""
    compiled = _library(x, fx)
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
    compiled = None if torch.is_grad_enabled() else _library(x, fx, before)
    together = x.is_contiguous() and fx.is_contiguous() and before.is_contiguous()
    if compiled is None or x.dim() != 2 or not x.shape == fx.shape == before.shape or not together:
        return None
    following = torch.empty_like(x)
    compiled.aitken(
        x.data_ptr(), fx.data_ptr(), before.data_ptr(), following.data_ptr(), *x.shape, tiny, longest,
        threads(x.numel(), len(x)),
    )  # fmt: skip
    return following


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    return _typed(tensors[0].dtype) if reachable(*tensors) else None


@functools.cache
def _typed(dtype: torch.dtype) -> ctypes.CDLL | None:
    compiled = library("rows", dtype)
    if compiled is not None:
        pointer, size, figures = ctypes.c_void_p, ctypes.c_ssize_t, (ctypes.c_double, ctypes.c_int)
        compiled.scale_rows.argtypes = (pointer, pointer, pointer, size, size, *figures)
        compiled.scale_rows_vjp.argtypes = (pointer, pointer, pointer, pointer, size, size, *figures)
        compiled.all_finite.argtypes = (pointer, size)
        compiled.aitken.argtypes = (pointer, pointer, pointer, pointer, size, size, ctypes.c_double, *figures)
        compiled.norms.argtypes = (pointer, pointer, pointer, pointer, size, size, ctypes.c_int)
    return compiled
