"""The ∞-norm ball ‖A‖∞ ≤ κ / max|φ'|, whose rows are independent ℓ1 balls: three maps onto it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._internal.context import outside_graphs, plain, transformed
from ..equations.scaling import scale_rows
from .base import Constraint


class RowScaling(Constraint):
    """a_i = v_i min(1, r/‖v_i‖₁), r = κ / max|φ'|: rows outside the ball are shrunk onto it, the others untouched.

    The default: it trains as well as the projection (``benchmarks/results/constraints.md``), every entry of a scaled
    row keeps a gradient, it costs far fewer operations, and unlike `SoftRowScaling` it
    leaves a matrix inside the ball as it is.

    Source: docs/theory.md §1.3; the vector-Jacobian product is s(g − sign(v) (aᵀg)/r).

    Example:
        >>> import torch
        >>> from implicitdl.constraints import RowScaling
        >>> RowScaling(kappa=0.5)(torch.tensor([[1.0, -1.0], [0.1, 0.2]]))
        tensor([[ 0.2500, -0.2500],
                [ 0.1000,  0.2000]])
    """

    scales_rows = True

    def forward(self, raw: Tensor) -> Tensor:
        return scale_rows(raw, self.radius)

    def right_inverse(self, A: Tensor) -> Tensor:
        return self._member(A)

    def contains(self, A: Tensor) -> bool:
        return self._in_ball(A)


class RowProjection(Constraint):
    """The nearest matrix of the ball: every row outside it is projected onto the ℓ1 ball, which makes it sparse.

    An entry that the projection sets to zero gets no gradient and stays zero until the row shrinks.

    Source: Duchi et al., Efficient projections onto the ℓ1-ball (2008); the threshold θ by Newton's method on the
    piecewise linear Σ(|v| − θ)₊ = r (Michelot 1986), all rows at once.

    Example:
        >>> import torch
        >>> from implicitdl.constraints import RowProjection
        >>> RowProjection(kappa=0.5)(torch.tensor([[1.0, -0.8], [0.1, 0.2]]))
        tensor([[ 0.3500, -0.1500],
                [ 0.1000,  0.2000]])
    """

    def forward(self, raw: Tensor) -> Tensor:
        return project_l1(raw, self.radius)

    def right_inverse(self, A: Tensor) -> Tensor:
        return self._member(A)

    def contains(self, A: Tensor) -> bool:
        return self._in_ball(A)


class SoftRowScaling(Constraint):
    """a_i = r t_i / (1 + ‖t_i‖₁): smooth in every row norm, onto the open ball; the weights are never left alone.

    Example:
        >>> import torch
        >>> from implicitdl.constraints import SoftRowScaling
        >>> SoftRowScaling(kappa=0.5)(torch.tensor([[1.0, -1.0], [0.0, 0.25]]))
        tensor([[ 0.1667, -0.1667],
                [ 0.0000,  0.1000]])
    """

    def forward(self, raw: Tensor) -> Tensor:
        return raw * (self.radius / (1 + raw.abs().sum(dim=-1, keepdim=True)))

    def right_inverse(self, A: Tensor) -> Tensor:
        # ‖a‖ = r‖t‖/(1 + ‖t‖), so t = a / (r − ‖a‖); a row on the sphere itself has no preimage.
        room = self.radius - self._member(A).abs().sum(dim=-1, keepdim=True)
        return A / room.clamp(min=self.radius * torch.finfo(A.dtype).eps)

    def contains(self, A: Tensor) -> bool:
        return self._in_ball(A)


def project_l1(v: Tensor, radius: float) -> Tensor:
    """Each row's nearest point of the ℓ1 ball; differentiable, a row inside or on the ball is itself."""
    size = v.detach().abs()
    outside = size.sum(dim=-1, keepdim=True) > radius
    if plain() and not bool(outside.any()):
        return v
    support = _Support.apply(size, radius) if transformed() else _support(size, radius)
    # With the support fixed, θ is the mean excess over it, and autograd through this line is the exact derivative.
    theta = ((v.abs() * support).sum(dim=-1, keepdim=True) - radius) / support.sum(dim=-1, keepdim=True)
    projected = v.sign() * (v.abs() - theta).clamp(min=0)
    # |v| − θ has the rounding of |v|, which may be far larger than the radius; one scaling takes it out of the norm.
    excess = projected.detach().abs().sum(dim=-1, keepdim=True) / radius
    return torch.where(outside, projected / excess.clamp(min=1), v)


class _Support(torch.autograd.Function):
    """`_support` out of the reach of torch.func's transforms; constant almost everywhere."""

    @staticmethod
    def forward(size: Tensor, radius: float) -> Tensor:
        return _support(size, radius)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], size: Tensor, radius: float) -> tuple[Tensor, int]:
        return _Support.apply(size.movedim(in_dims[0], 0), radius), 0


def _support(size: Tensor, radius: float) -> Tensor:
    """Which entries of each row survive; monotone, hence at most n passes, two or three near the ball."""
    if torch.compiler.is_dynamo_compiling():
        return outside_graphs(_support)(size, radius)
    support = torch.ones_like(size)
    count = size.numel()
    while True:
        theta = ((size * support).sum(dim=-1, keepdim=True) - radius) / support.sum(dim=-1, keepdim=True)
        support = (size > theta.clamp(min=0)).to(size.dtype)
        # A row inside the ball has θ ≤ 0 and keeps all that is not zero; one of zeros has nothing to keep.  Beside an
        # entry of 2⁵² radii the radius is rounding, and θ is that entry: it survives all the same.
        largest = (size == size.amax(dim=-1, keepdim=True)).to(size.dtype)
        support = torch.where(support.any(dim=-1, keepdim=True), support, largest)
        if (remaining := int(support.sum())) == count:
            return support
        count = remaining
