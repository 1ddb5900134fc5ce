"""Maps f(x, u) to solve with a `DEQ`: a convolutional residual block, and a dense tanh layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._internal.errors import positive_int, wrong
from ..activations import TANH
from ..equations.equilibrium import Equilibrium
from ..statespace import StateSpace


class ResidualBlock(nn.Module):
    """The convolutional block of the deep equilibrium tutorial, on images with group norm.

    f(x, u) = norm₃(relu(x + norm₂(u + conv₂(norm₁(relu(conv₁ x))))))

    Arguments:
        channels: of x and u.
        inner_channels: between the convolutions.
        kernel_size: odd, so that the image keeps its size.
        num_groups: of the group norms; divides both numbers of channels.

    Source: Kolter, Duvenaud & Johnson, Deep Implicit Layers tutorial (NeurIPS 2020), chapter 4.

    Example:
        >>> import torch
        >>> from implicitdl.nn import ResidualBlock
        >>> f = ResidualBlock(8, 16)
        >>> u = torch.randn(2, 8, 7, 7)
        >>> f(torch.zeros_like(u), u).shape
        torch.Size([2, 8, 7, 7])
    """

    def __init__(self, channels: int, inner_channels: int, kernel_size: int = 3, num_groups: int = 8) -> None:
        super().__init__()
        who = "ResidualBlock"
        if positive_int(who, "kernel_size", kernel_size) % 2 == 0:
            raise wrong(who, "an odd kernel_size", kernel_size, "An even one changes the size of the image.")
        for name, count in (("channels", channels), ("inner_channels", inner_channels)):
            if positive_int(who, name, count) % positive_int(who, "num_groups", num_groups):
                raise wrong(who, f"{name} to be a multiple of num_groups={num_groups}", count)
        padding = kernel_size // 2
        self.conv1 = nn.Conv2d(channels, inner_channels, kernel_size, padding=padding, bias=False)
        self.conv2 = nn.Conv2d(inner_channels, channels, kernel_size, padding=padding, bias=False)
        self.norm1 = nn.GroupNorm(num_groups, inner_channels)
        self.norm2 = nn.GroupNorm(num_groups, channels)
        self.norm3 = nn.GroupNorm(num_groups, channels)
        with torch.no_grad():  # The tutorial's: f starts close to a constant, and so as a contraction.
            self.conv1.weight.normal_(0, 0.01)
            self.conv2.weight.normal_(0, 0.01)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        y = self.norm1(F.relu(self.conv1(x)))
        z: Tensor = self.norm3(F.relu(x + self.norm2(u + self.conv2(y))))
        return z


class TanhBlock(nn.Module):
    """A dense tanh layer, f(x, u) = tanh(Wx + u).

    The tutorial's three layers are this one map: ``DEQ(f, solver=Picard(), adjoint=Unrolled())`` iterates and
    differentiates the iterations, ``solver=Newton()`` takes Newton's steps instead, and ``adjoint=ImplicitAdjoint()``
    differentiates the solution implicitly.

    Arguments:
        features: n, of x and u, (batch, n).

    Source: Kolter, Duvenaud & Johnson, Deep Implicit Layers tutorial (NeurIPS 2020), chapter 1.

    Example:
        >>> import torch
        >>> from implicitdl import DEQ, Picard, Unrolled
        >>> from implicitdl.nn import TanhBlock
        >>> u = torch.randn(10, 50)
        >>> f = TanhBlock(50)
        >>> iterated = DEQ(f, solver=Picard(), adjoint=Unrolled())(u)
        >>> torch.allclose(iterated, DEQ(f)(u), atol=1e-3)
        True
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        positive_int("TanhBlock", "features", features)
        self.linear = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + u)

    def equilibrium(self, u: Tensor) -> Equilibrium:
        """The same map with its structure: the Jacobian is diag(1 − tanh²) W."""
        if u.dim() != 2 or u.shape[1] != self.linear.in_features:
            raise wrong("TanhBlock", f"u of shape (batch, n={self.linear.in_features})", tuple(u.shape))
        return Equilibrium(self.linear.weight, u, TANH)

    def equilibrium_statespace(self) -> StateSpace:
        """u ↦ x, the solution, as matrices: A = W and B = C = I."""
        W = self.linear.weight
        unit = torch.eye(len(W), dtype=W.dtype, device=W.device)
        return StateSpace(W, unit, unit, blocks=TANH)
