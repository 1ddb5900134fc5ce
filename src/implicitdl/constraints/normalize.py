"""Weight and spectral normalisation whose bound holds exactly, for matrices and for kernels of convolutions."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from .._internal.errors import choice, positive, positive_int, wrong
from ..equations.circular import transfer
from .base import Constraint


class SpectralNorm(Constraint):
    """‖W‖₂ ≤ r, r = κ / max|φ'|: a weight outside the ball is scaled onto it, W = V min(1, r/σ(V)).

    σ is the largest singular value itself, from a decomposition.  A power iteration approaches it from below, so its
    quotient exceeds the bound, and so does one that a free scale multiplies; here the scale is that of V, up to r.

    A matrix is measured exactly.  For the kernel of a convolution σ is a bound of the operator, the norm of the kernel
    as a matrix of C_out rows times √(k₁k₂…): every input pixel is in at most k₁k₂… patches.  It holds for zero and
    circular padding, every stride, dilation, number of groups and image size.  With ``size`` given it is, for circular
    padding, the norm of the operator itself, from its Fourier transform; for zero padding that of the convolution on
    the torus with room for the padding, of which the operator is a part, so a bound close above.

    Arguments:
        kappa, lipschitz: as for `Constraint`.
        size: (height, width) of the images that a two-dimensional kernel without dilation is applied to.
        padding_mode: "zeros" or "circular", as of ``torch.nn.Conv2d``; it matters together with ``size``.

    Source: the Fourier transform as in Sedghi, Gupta & Long, The Singular Values of Convolutional Layers (2019).

    Example:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> from implicitdl.constraints import SpectralNorm
        >>> layer = parametrize.register_parametrization(torch.nn.Linear(8, 8), "weight", SpectralNorm(kappa=0.5))
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 0.5 + 1e-6)
        True
    """

    def __init__(
        self,
        kappa: float = 0.99,
        lipschitz: float = 1.0,
        *,
        size: tuple[int, int] | None = None,
        padding_mode: Literal["zeros", "circular"] = "zeros",
    ) -> None:
        super().__init__(kappa, lipschitz)
        self.size = None if size is None else tuple(positive_int("SpectralNorm", "size", part) for part in size)
        self.padding_mode = choice("SpectralNorm", "padding_mode", padding_mode, ("zeros", "circular"))

    def forward(self, raw: Tensor) -> Tensor:
        return raw * (self.radius / self.sigma(raw).clamp(min=self.radius)).to(raw.dtype)

    def right_inverse(self, A: Tensor) -> Tensor:
        """A itself.  One outside the ball is taken too, as the layers have that this is registered on."""
        return A

    def contains(self, A: Tensor) -> bool:
        rounding = A[0].numel() * torch.finfo(A.dtype).eps
        return float(self.sigma(A.detach())) <= self.radius * (1 + rounding)

    def sigma(self, weight: Tensor) -> Tensor:
        """‖W‖₂ of a matrix; of a kernel, the norm of its convolution or the bound of it."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.size is None or weight.dim() == 2:
            return torch.linalg.matrix_norm(weight.flatten(1), 2) * prod(weight.shape[2:]) ** 0.5
        if weight.dim() != 4:
            raise wrong(
                "SpectralNorm", "a matrix or a kernel (C_out, C_in, k₁, k₂), since size is given",
                tuple(weight.shape), "Leave size out for other kernels.",
            )  # fmt: skip
        room = (0, 0) if self.padding_mode == "circular" else (weight.shape[2] - 1, weight.shape[3] - 1)
        return torch.linalg.matrix_norm(transfer(weight, (self.size[0] + room[0], self.size[1] + room[1])), 2).amax()


class WeightNorm(nn.Module):
    """w_i = bound · sigmoid(g_i) · v_i / ‖v_i‖₂: direction and length of every row learned apart, ‖w_i‖₂ < bound.

    A row is all that one output channel is made of.  The length saturates smoothly, so no step of an optimiser takes
    it beyond the bound.  It bounds rows and not the operator: for a contraction take `SpectralNorm` or `RowScaling`.

    Arguments:
        bound: the length that no row reaches, > 0.

    Source: Salimans & Kingma, Weight Normalization (2016), eq. (2); the bounded length is this library's.

    Example:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> from implicitdl.constraints import WeightNorm
        >>> layer = parametrize.register_parametrization(torch.nn.Linear(8, 4), "weight", WeightNorm(bound=2.0))
        >>> bool((layer.weight.norm(dim=1) < 2.0).all())
        True
    """

    def __init__(self, bound: float = 1.0) -> None:
        super().__init__()
        self.bound = positive("WeightNorm", "bound", bound)

    def forward(self, direction: Tensor, length: Tensor) -> Tensor:
        return direction * (self.bound * torch.sigmoid(length) / _row_norms(direction))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Direction and length of a weight; a row too long for the set starts at nine tenths of the bound."""
        size = _row_norms(weight)
        if not bool((size > 0).all()):
            raise wrong(
                "WeightNorm.right_inverse", "rows that are not zero", f"{int((size == 0).sum())} zero rows",
                "A zero row has no direction; initialise the weight first.",
            )  # fmt: skip
        # Nearer to the bound the sigmoid has hardly a slope, and the length would not learn.
        share = torch.where(size < self.bound, size / self.bound, 0.9)
        return weight, torch.logit(share)

    def contains(self, weight: Tensor) -> bool:
        """Whether no row is longer than the bound, up to rounding."""
        rounding = weight[0].numel() * torch.finfo(weight.dtype).eps
        return float(_row_norms(weight.detach()).max()) <= self.bound * (1 + rounding)

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


def _row_norms(weight: Tensor) -> Tensor:
    """(C_out, 1, …)"""
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
