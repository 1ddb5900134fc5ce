"""The monotone set for convolutions: a kernel A with I − A ⪰ mI on images of every size."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .._internal.errors import positive_int, wrong
from ..equations.circular import transfer
from .monotone import Monotone, monotonicity


class MonotoneKernel(Monotone):
    """A = (1 − m)I − PᵀP + Q − Qᵀ with convolutions for P and Q, so that A is one too, of 2k − 1 taps a side.

    I − A ⪰ mI holds on the infinite grid, and so on every image with circular padding, whose frequencies are some of
    the grid's, and with zero padding, which cuts a block out of A.

    The free parameter (2, C, C, k, k) holds both kernels.  As for `Monotone`, P = √(1 − m) I + raw[0] and Q = raw[1],
    so that raw = 0 is A = 0.

    Arguments:
        kappa, lipschitz, m: as for `Monotone`.
        size: (height, width) of the circular images whose frequencies `contains` looks at; nothing else needs a size.

    Source: Winston & Kolter, Monotone operator equilibrium networks (2020), on convolutional layers.

    Example:
        >>> import torch
        >>> from implicitdl.constraints import MonotoneKernel
        >>> constraint = MonotoneKernel(m=0.1, size=(14, 14))
        >>> A = constraint(torch.randn(2, 4, 4, 3, 3))
        >>> A.shape, constraint.contains(A)
        (torch.Size([4, 4, 5, 5]), True)
    """

    def __init__(
        self,
        kappa: float | None = None,
        lipschitz: float = 1.0,
        *,
        m: float | None = None,
        size: tuple[int, int] = (32, 32),
    ) -> None:
        super().__init__(kappa, lipschitz, m=m)
        height, width = (positive_int("MonotoneKernel", "size", part) for part in size)
        self.size = height, width

    def forward(self, raw: Tensor) -> Tensor:
        if raw.dim() != 5 or raw.shape[0] != 2 or raw.shape[1] != raw.shape[2] or not raw.shape[3] % 2 == 1:
            raise wrong("MonotoneKernel", "raw of shape (2, C, C, k, k) with an odd k", tuple(raw.shape))
        k = raw.shape[-1]
        unit = F.pad(self._eye(raw)[..., None, None], [k // 2] * 4)
        P, Q = raw[0] + self.kappa**0.5 * unit, raw[1]
        # (PᵀP)[i, j, δ] = Σ_{o, ε} P[o, i, ε] P[o, j, ε + δ], a correlation over the output channels o of P.
        inputs = P.transpose(0, 1)
        with torch.autocast(raw.device.type, enabled=False):
            square = F.conv2d(inputs, inputs, padding=k - 1).transpose(0, 1)
        skew = Q - Q.transpose(0, 1).flip(2, 3)
        return F.pad(self.kappa * unit + skew, [k // 2] * 4) - square

    def right_inverse(self, A: Tensor) -> NoReturn:
        raise wrong(
            "MonotoneKernel.right_inverse", "to be spared", "a kernel",
            "On a plane a positive kernel need not be PᵀP of any finite P; start from raw = 0, which is A = 0.",
        )  # fmt: skip

    def contains(self, A: Tensor) -> bool:
        rounding = A[0].numel() * torch.finfo(A.dtype).eps * max(1.0, float(A.detach().abs().max()))
        return monotonicity(transfer(A.detach().double(), self.size)) >= self.m - rounding

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"
