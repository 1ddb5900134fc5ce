"""Convolution with circular padding: a block of channels for every frequency, so that norms and inverses are exact."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from math import exp, pi

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..activations import RELU, Activation
from .equilibrium import Equilibrium
from .map import Explicit, Linearization, LinearMap, Splittable, by_products, once
from .resolvent import finite_weights


def transfer(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The Fourier transform of a convolution: K̂(ω) = Σ_δ K[δ] exp(iω·δ), a matrix of channels for every frequency.

    Arguments:
        kernel: (C_out, C_in, k₁, k₂) as ``torch.nn.functional.conv2d`` takes it; it may be larger than the image.
        size: (height, width) of the images.

    Returns:
        (height, width // 2 + 1, C_out, C_in), complex; the other frequencies are conjugates of these.
    """

    def waves(count: int, length: int, taps: int) -> Tensor:
        shifts = torch.arange(taps, device=kernel.device) - (taps - 1) // 2
        angle = torch.outer(torch.arange(count, device=kernel.device), shifts) % length
        turn = (2 * pi / length) * angle.to(kernel.dtype)
        return torch.complex(turn.cos(), turn.sin())

    height, width = size
    rows = waves(height, height, kernel.shape[2])
    columns = waves(width // 2 + 1, width, kernel.shape[3])
    return torch.einsum("oiab,ha,wb->hwoi", torch.complex(kernel, torch.zeros_like(kernel)), rows, columns)


class CircularConvolution:
    """The linear map x ↦ A∗x on images with circular padding, as rows (batch, C·height·width).

    Arguments:
        symbol: (height, width // 2 + 1, C, C) complex: the `transfer` of a kernel; `of` makes it.
        size: (height, width).
        m: a number for which I − A ⪰ mI is known to hold; found from the eigenvalues when left out.
    """

    def __init__(self, symbol: Tensor, size: tuple[int, int], m: float | None = None) -> None:
        self.symbol, self.size, self._m = symbol, size, m
        self._transpose: CircularConvolution | None = None
        self._bounds: list[tuple[float, float]] = []
        self._resolvents: dict[float, CircularConvolution] = {}

    @classmethod
    def of(cls, kernel: Tensor, size: tuple[int, int], m: float | None = None) -> CircularConvolution:
        """The convolution with a kernel (C, C, k₁, k₂)."""
        return cls(transfer(kernel, size), size, m)

    def __call__(self, x: Tensor) -> Tensor:
        height, half, channels, _ = self.symbol.shape
        images = x.reshape(len(x), channels, *self.size)
        waves = torch.fft.rfft2(images).permute(2, 3, 0, 1).reshape(height * half, len(x), channels)
        waves = torch.bmm(waves, self.symbol.mT.reshape(height * half, channels, channels))
        waves = waves.view(height, half, len(x), channels).permute(2, 3, 0, 1)
        return torch.fft.irfft2(waves, s=self.size).reshape(len(x), -1)

    def detach(self) -> CircularConvolution:
        """The same map without a graph; what has been found for one holds for both."""
        constant = copy(self)
        constant.symbol = self.symbol.detach()
        return constant

    def adjoint(self) -> CircularConvolution:
        """Aᵀ."""
        adjoint = CircularConvolution(self.symbol.mH, self.size)
        adjoint._transpose = self
        return adjoint

    def resolvent(self, alpha: float) -> CircularConvolution:
        """(I + α(I − A))⁻¹, a constant; that of Aᵀ is the adjoint, so a backward solve inverts nothing again."""
        if self._transpose is not None:
            return self._transpose.resolvent(alpha).adjoint()
        if alpha not in self._resolvents:
            shifted = (1 + alpha) * self._identity() - alpha * finite_weights(self.symbol.detach())
            self._resolvents[alpha] = CircularConvolution(torch.linalg.inv(shifted), self.size)
        return self._resolvents[alpha]

    def bounds(self) -> tuple[float, float]:
        """(m, L) with I − A ⪰ mI and ‖I − A‖₂ ≤ L; those of Aᵀ are the same."""
        if self._transpose is not None:
            return self._transpose.bounds()
        if not self._bounds:
            F = self._identity() - finite_weights(self.symbol.detach())
            m = float(torch.linalg.eigvalsh((F + F.mH) / 2).amin()) if self._m is None else self._m
            self._bounds.append((m, _norm_bound(F)))
        return self._bounds[0]

    def _identity(self) -> Tensor:
        return torch.eye(self.symbol.shape[-1], dtype=self.symbol.dtype, device=self.symbol.device)


# ‖G^p‖_F is at most √C times ‖G‖₂^p, so p = 32 leaves a bound C^(1/128) above the norm: 3 % with 32 channels.
_SQUARINGS = 5


def _norm_bound(M: Tensor) -> float:
    """The largest ‖M‖₂ of a batch, from above, by products only: a decomposition would cost more than a solve.

    ‖M‖₂² = ‖G‖₂ ≤ ‖G^p‖_F^(1/p) for G = MᴴM and p = 2^t, scaled at every squaring.  Source: Delattre et al.,
    Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration (2023).
    """
    G, logarithm = M.mH @ M, 0.0
    for t in range(_SQUARINGS + 1):
        G = G @ G if t else G
        size = torch.linalg.matrix_norm(G).amax().clamp(min=torch.finfo(G.real.dtype).tiny)
        logarithm += float(size.log()) / 2**t
        G = G / size
    return exp(logarithm / 2)


class CircularEquilibrium(Equilibrium):
    """x ↦ φ(A∗x + b) for images x, the convolution padded circularly; every solver serves it, splitting included.

    The state has the precision of the Fourier transform, float32 where b has half of that.

    Arguments:
        A: the convolution, C channels to C channels.
        b: (batch, C, height, width) input term.
        activation: φ.

    Example:
        >>> import torch
        >>> from implicitdl import CircularConvolution, CircularEquilibrium, fixed_point
        >>> A = CircularConvolution.of(torch.full((1, 1, 3, 3), -0.1), size=(4, 4))
        >>> b = torch.ones(1, 1, 4, 4)
        >>> fixed_point(CircularEquilibrium(A, b), torch.zeros_like(b)).value[0, 0, 0]
        tensor([0.5263, 0.5263, 0.5263, 0.5263])
    """

    def __init__(self, A: CircularConvolution, b: Tensor, activation: Activation = RELU) -> None:
        shape = (A.symbol.shape[-1], *A.size)
        if b.dim() != 4 or b.shape[1:] != shape:
            raise wrong("CircularEquilibrium", f"b of shape (batch, (C, height, width)={shape})", tuple(b.shape))
        self.map, self.activation = A, activation
        self.b = b.flatten(1).to(A.symbol.dtype.to_real())
        self.triangular, self.radius = False, None
        self.check_interval = 1  # a transform costs far more than a look at the residual
        self._shape = b.shape[1:]

    @property
    def named_weights(self) -> dict[str, Tensor]:
        return {"A": torch.view_as_real(self.map.symbol)}

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.activation.phi(self.affine(x.flatten(1))).view_as(x)

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(1).to(self.b.dtype)

    def state(self, rows: Tensor) -> Tensor:
        return rows.view(-1, *self._shape)

    def affine(self, y: Tensor) -> Tensor:
        return self.map(y) + self.b

    def resolvent(self, alpha: float) -> CircularConvolution:
        return self.map.resolvent(alpha)

    def bounds(self) -> tuple[float, float]:
        return self.map.bounds()

    def linearize(self, x: Tensor, slope: Tensor | None = None) -> Linearization:
        return CircularLinearization(self, x)

    def jacobian(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        at = CircularLinearization(self, x)
        return at.value, once(lambda: by_products(at.vjp, at.value, 1))

    def explicit(self) -> Explicit:
        build = partial(_build, shape=self._shape, activation=self.activation)
        return Explicit(build, (self.map.symbol,), (self.b,))


def _build(symbol: Tensor, b: Tensor, shape: torch.Size, activation: Activation) -> CircularEquilibrium:
    A = CircularConvolution(symbol, (shape[1], shape[2]))
    return CircularEquilibrium(A, b.view(-1, *shape), activation)


class CircularLinearization(Linearization):
    """φ(A∗x + b) at x: J = diag(φ'(z)) A."""

    def __init__(self, f: CircularEquilibrium, x: Tensor) -> None:
        z = f.affine(x)
        self.value = f.activation.phi(z)
        self._map, self._slope = f.map.detach(), f.activation.dphi(z.detach())

    def vjp(self, v: Tensor) -> Tensor:
        return self._map.adjoint()(v * self._slope)

    def jvp(self, w: Tensor) -> Tensor:
        return self._map(w) * self._slope

    def adjoint_map(self, g: Tensor) -> LinearMap:
        return CircularAdjoint(self._map.adjoint(), self._slope, g)

    def tangent_map(self, h: Tensor) -> LinearMap:
        return CircularTangent(self._map, self._slope, h)


class CircularAdjoint(LinearMap, Splittable):
    """v ↦ g + Aᵀ∗(φ' ∘ v); y = φ' ∘ v solves y = φ' ∘ (Aᵀ∗y + g).

    Arguments:
        A: the convolution in it, which is Aᵀ.
        slope: (batch, d)  φ'.
        g: (batch, d).
    """

    def __init__(self, A: CircularConvolution, slope: Tensor, g: Tensor) -> None:
        self.map, self.slope, self.constant, self.b = A, slope, g, g

    def divided(self, unit: Tensor) -> LinearMap:
        part = copy(self)
        part.constant, part.b = self.constant / unit, self.b / unit
        return part

    def product(self, v: Tensor) -> Tensor:
        return self.map(v * self.slope)

    def take(self, rows: Tensor) -> CircularAdjoint:
        return CircularAdjoint(self.map, self.slope[rows], self.constant[rows])

    def affine(self, y: Tensor) -> Tensor:
        return self.map(y) + self.b

    def inner(self, v: Tensor) -> Tensor:
        return v * self.slope

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        return u / (self.slope + alpha * (1 - self.slope))

    def resolvent(self, alpha: float) -> CircularConvolution:
        return self.map.resolvent(alpha)

    def bounds(self) -> tuple[float, float]:
        return self.map.bounds()


class CircularTangent(CircularAdjoint):
    """w ↦ h + φ' ∘ (A∗w): y = w − h solves y = φ' ∘ (A∗y + A∗h), the adjoint's equation with A for Aᵀ."""

    def __init__(self, A: CircularConvolution, slope: Tensor, h: Tensor) -> None:
        super().__init__(A, slope, A(h))
        self.constant = h

    def product(self, w: Tensor) -> Tensor:
        return self.map(w) * self.slope

    def take(self, rows: Tensor) -> CircularTangent:
        return CircularTangent(self.map, self.slope[rows], self.constant[rows])

    def inner(self, w: Tensor) -> Tensor:
        return w - self.constant

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        return self.constant + self.slope * super().prox(u, alpha)
