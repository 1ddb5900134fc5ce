"""Rows scaled onto the ℓ1 ball, with a derivative of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._internal.context import only_numbers, plain
from ..kernels import loops as kernel


def scale_rows(v: Tensor, radius: float) -> Tensor:
    """a_i = v_i min(1, r/‖v_i‖₁), row by row."""
    if not plain():
        return v * row_scale(v, radius)
    scaled: Tensor = _ScaleRows.apply(v, radius)
    return scaled


def row_scale(v: Tensor, radius: float) -> Tensor:
    """min(1, r/‖v‖₁) of every row, in operations that can be differentiated; exactly 1, and flat, inside the ball."""
    size = v.abs().sum(dim=-1, keepdim=True)
    inside = size <= radius
    return (radius / size.masked_fill(inside, radius)).masked_fill(inside, 1.0)


class _ScaleRows(torch.autograd.Function):
    """v min(1, r/‖v‖₁) with its vector-Jacobian product in a few operations, where autograd's takes many."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, radius: float) -> Tensor:
        scaled, scale = kernel.scale_rows(v, radius) or _scale_rows(v, radius)
        ctx.save_for_backward(v, scale)
        ctx.radius = radius
        return scaled

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        v, scale = ctx.saved_tensors
        return scale_rows_vjp(v, scale, g, ctx.radius), None


def _scale_rows(v: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    # Clamped after the division: r/r need not be 1 in floating point, and 1 is how a row inside is known.
    scale = (radius / torch.linalg.vector_norm(v, ord=1, dim=-1, keepdim=True)).clamp_(max=1.0)
    return v * scale, scale


def scale_rows_vjp(v: Tensor, scale: Tensor, g: Tensor, radius: float) -> Tensor:
    """∂L/∂v = s g − s² sign(v) (vᵀg)/r on scaled rows, and g on the others, where s = 1.

    In differentiable operations of v, s included, when a second derivative is to be taken.
    """
    if only_numbers(g):
        product = kernel.scale_rows_vjp(v, scale, g, radius)
        if product is not None:
            return product
    inside = scale == 1
    if torch.is_grad_enabled():
        scale = row_scale(v, radius)
    along = ((v * g).sum(dim=-1, keepdim=True) * (scale * scale / radius)).masked_fill(inside, 0.0)
    return torch.addcmul(g * scale, v.sign(), along, value=-1)
