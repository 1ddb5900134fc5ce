"""The linear equations of the derivative of φ(xAᵀ + b): v = g + (v ∘ φ') A, and the same for tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import sweeps as kernel
from ..kernels.sweeps import Swept
from .map import check_interval
from .resolvent import bounds, resolvent
from .triangular import substitute


class EquilibriumAdjoint:
    """v ↦ g + (v ∘ φ') A, linear.

    y = φ' ∘ v solves y = φ' ∘ (yA + g), whose "activation" z ↦ φ' ∘ z has slopes in [0, 1] like φ: splitting serves
    it as it serves the equilibrium, with Aᵀ in place of A.
    """

    def __init__(self, A: Tensor, slope: Tensor, g: Tensor, triangular: bool) -> None:
        self.A, self.slope, self.g, self.triangular = A, slope, g, triangular
        self.check_interval = check_interval(A.shape[0])

    def __call__(self, v: Tensor) -> Tensor:
        return torch.addmm(self.g, v * self.slope, self.A)

    def take(self, rows: Tensor) -> EquilibriumAdjoint:
        return EquilibriumAdjoint(self.A, self.slope[rows], self.g[rows], self.triangular)

    def sweeps(self, v: Tensor | None, *settings: Any) -> Swept | None:
        if type(self) is not EquilibriumAdjoint:
            return None
        return kernel.sweeps(self.A.t(), None, self.g, v, kernel.SLOPE, self.slope, *settings)

    @property
    def b(self) -> Tensor:
        return self.g

    def after_zero(self) -> Tensor:
        return self.g

    def affine(self, y: Tensor) -> Tensor:
        return torch.addmm(self.g, y, self.A)

    def inner(self, v: Tensor) -> Tensor:
        return v * self.slope

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        """The v with φ' ∘ v = φ' u / (φ' + α(1 − φ')), and v = u at α = 1 whatever φ'."""
        return u / (self.slope + alpha * (1 - self.slope))

    def resolvent(self, alpha: float) -> Callable[[Tensor], Tensor]:
        return resolvent(self.A.t(), alpha)

    def bounds(self) -> tuple[float, float]:
        return bounds(self.A)

    def substitute(self) -> Tensor | None:
        if not self.triangular:
            return None
        # In s = v ∘ φ' the equation reads s = φ' ∘ (sA + g), a substitution in the other direction.
        slope = self.slope
        s = substitute(self.A, self.g, lambda z, i: z * slope[:, i], backwards=False)
        return torch.addmm(self.g, s, self.A)


class EquilibriumTangent(EquilibriumAdjoint):
    """w ↦ h + φ' ∘ (wAᵀ), linear: y = w − h solves y = φ' ∘ (yAᵀ + hAᵀ), the adjoint's equation with A transposed."""

    def __init__(self, A: Tensor, slope: Tensor, h: Tensor, triangular: bool) -> None:
        super().__init__(A.t(), slope, h @ A.t(), triangular)
        self.h = h

    def __call__(self, w: Tensor) -> Tensor:
        return torch.addcmul(self.h, w @ self.A, self.slope)

    def take(self, rows: Tensor) -> EquilibriumTangent:
        return EquilibriumTangent(self.A.t(), self.slope[rows], self.h[rows], self.triangular)

    def inner(self, w: Tensor) -> Tensor:
        return w - self.h

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        return self.h + self.slope * super().prox(u, alpha)

    def substitute(self) -> Tensor | None:
        if not self.triangular:
            return None
        slope = self.slope
        return self.h + substitute(self.A, self.g, lambda z, i: z * slope[:, i], backwards=True)
