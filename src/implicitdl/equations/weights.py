"""The matrix of an equilibrium: one that is there, or one whose rows are still to be shrunk onto the ℓ1 ball."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._internal.context import only_numbers, plain
from ..kernels import rows as kernel


def scale_rows(v: Tensor, radius: float) -> Tensor:
    """a_i = v_i min(1, r/‖v_i‖₁), row by row."""
    if not plain():
        return v * row_scale(v, radius)
    scaled: Tensor = _ScaleRows.apply(v, radius)
    return scaled


class Given:
    """A matrix A that is there.

    Attributes:
        source: the tensor that a gradient goes to, A itself.
        radius: of the balls onto which rows are to be shrunk; none are.
    """

    radius: float | None = None

    def __init__(self, A: Tensor) -> None:
        self.source = A

    @property
    def value(self) -> Tensor:
        """A, with its graph."""
        return self.source

    @property
    def numbers(self) -> Tensor:
        """A, without a graph."""
        return self.source.detach()

    def scaling(self) -> tuple[None, None, float]:
        """That there is none."""
        return None, None, 0.0

    def pull(self, g: Tensor) -> Tensor:
        """The cotangent of the source that a cotangent g of A makes."""
        return g


class ScaledRows:
    """A = `scale_rows(source, radius)`, which nobody has made yet: a compiled loop that reads it makes it on the way.

    Only where code is `plain`.

    Attributes:
        source: (n, n) the tensor that a gradient goes to.
        radius: of the ℓ1 balls.
    """

    def __init__(self, source: Tensor, radius: float) -> None:
        self.source, self.radius = source, radius
        self._made: tuple[Tensor, Tensor, Tensor] | None = None

    @cached_property
    def value(self) -> Tensor:
        """A, with its graph, even where the first to ask has no use for one."""
        with torch.enable_grad():
            return scale_rows(self.source, self.radius)

    def made(self, A: Tensor, scale: Tensor) -> None:
        """Take in what a compiled loop has made of the source: A and the factors (n, 1) of its rows."""
        # The numbers that were read: before backward, `Module.to` may give a parameter others, of another dtype.
        self._made = A, self.source.detach(), scale

    @property
    def numbers(self) -> Tensor:
        """A, without a graph."""
        return self.value.detach() if self._made is None else self._made[0]

    def scaling(self) -> tuple[Tensor, Tensor, float]:
        """What A was made of: these rows times factors (n, 1), in balls of this radius."""
        assert self._made is not None
        _, rows, scale = self._made
        return rows, scale, self.radius

    def pull(self, g: Tensor) -> Tensor:
        """The cotangent of the source that a cotangent g of A makes, once A has been made."""
        rows, scale, radius = self.scaling()
        return _pull(self.source if torch.is_grad_enabled() else rows, scale, g, radius)


# What an `Equilibrium` takes for its A.
Weight = Given | ScaledRows


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
        return _pull(v, scale, g, ctx.radius), None


def _scale_rows(v: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    # Clamped after the division: r/r need not be 1 in floating point, and 1 is how a row inside is known.
    scale = (radius / torch.linalg.vector_norm(v, ord=1, dim=-1, keepdim=True)).clamp_(max=1.0)
    return v * scale, scale


def _pull(v: Tensor, scale: Tensor, g: Tensor, radius: float) -> Tensor:
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
