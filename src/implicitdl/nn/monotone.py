"""A convolutional equilibrium that exists for all weights: I − A ⪰ mI."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._internal.errors import positive_int, wrong
from ..activations import RELU, Activation
from ..constraints import MonotoneKernel
from ..constraints.monotone import require_proximal
from ..equations.circular import CircularConvolution, CircularEquilibrium


class MonotoneConvBlock(nn.Module):
    """f(x, u) = φ(A∗x + u) on images, A a convolution with circular padding and I − A ⪰ mI.

    It has one equilibrium, whatever the weights, and operator splitting finds it:
    ``DEQ(MonotoneConvBlock(32), solver=PeacemanRachford(), adjoint=ImplicitAdjoint(solver=PeacemanRachford()))``.
    Plain iteration need not.

    Arguments:
        channels: C, of x and u.
        kernel_size: k of the two free kernels, odd; A has 2k − 1 taps a side.
        m: the strong monotonicity of I − A, in (0, 1).
        activation: φ, with slopes in [0, 1].
        device, dtype: of the kernels.

    Source: Winston & Kolter, Monotone operator equilibrium networks (2020).

    Example:
        >>> import torch
        >>> from implicitdl import DEQ, PeacemanRachford
        >>> from implicitdl.nn import MonotoneConvBlock
        >>> deq = DEQ(MonotoneConvBlock(8), solver=PeacemanRachford())
        >>> deq(torch.randn(2, 8, 5, 5)).shape, bool(deq.stats.converged.all())
        (torch.Size([2, 8, 5, 5]), True)
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        *,
        m: float = 0.1,
        activation: Activation = RELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        who = "MonotoneConvBlock"
        positive_int(who, "channels", channels)
        if positive_int(who, "kernel_size", kernel_size) % 2 == 0:
            raise wrong(who, "an odd kernel_size", kernel_size, "An even one has no middle.")
        require_proximal(who, activation)
        self.activation = activation
        self.constraint = MonotoneKernel(m=m)
        raw = torch.empty(2, channels, channels, kernel_size, kernel_size, device=device, dtype=dtype)
        # As torch.nn.Conv2d draws its kernels: of each, the output of unit input has variance 1/3.
        bound = (channels * kernel_size**2) ** -0.5
        self.raw = nn.Parameter(raw.uniform_(-bound, bound))

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        return self.equilibrium(u)(x)

    def equilibrium(self, u: Tensor) -> CircularEquilibrium:
        """The same map with its structure."""
        A = CircularConvolution.of(self.constraint(self.raw), (u.shape[2], u.shape[3]), self.constraint.m)
        return CircularEquilibrium(A, u, self.activation)

    def extra_repr(self) -> str:
        return f"channels={self.raw.shape[1]}, kernel_size={self.raw.shape[3]}, activation={self.activation.name}"
