"""The equilibrium with A = LRᵀ, and the same equation in the r dimensions in which it is solved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..activations import RELU, Activation
from .equilibrium import Equilibrium, check_interval
from .map import Explicit, Linearization, LinearMap, Map


class LowRankEquilibrium(Equilibrium):
    """x ↦ φ(xAᵀ + b) with A = LRᵀ, never formed; `reduced` is the same equation in r dimensions.

    Arguments:
        L, R: (n, r).
        b: (batch, n).
        activation: φ.
    """

    def __init__(self, L: Tensor, R: Tensor, b: Tensor, activation: Activation = RELU) -> None:
        self.L, self.R, self.b = L.to(b.dtype), R.to(b.dtype), b
        self.activation, self.triangular, self.radius = activation, False, None
        self.check_interval = check_interval(L.shape[0])

    @property
    def named_weights(self) -> dict[str, Tensor]:
        return {"L": self.L, "R": self.R}

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.lift(x @ self.R)

    def lift(self, s: Tensor) -> Tensor:
        """x = φ(sLᵀ + b) of the reduced state s = xR."""
        return self.activation.phi(torch.addmm(self.b, s, self.L.t()))

    def reduced(self) -> Map:
        return ReducedEquilibrium(self)


class ReducedEquilibrium(Map):
    """s ↦ φ(sLᵀ + b)R: x = φ(xRLᵀ + b) holds exactly when s = xR is its fixed point and x = φ(sLᵀ + b)."""

    def __init__(self, f: LowRankEquilibrium) -> None:
        self._f = f
        self.check_interval = f.check_interval

    def __call__(self, s: Tensor, /) -> Tensor:
        return self._f.lift(s) @ self._f.R

    @property
    def named_weights(self) -> dict[str, Tensor]:
        return self._f.named_weights

    @property
    def closed_form(self) -> bool:
        return True

    def jacobian(self, s: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        at = ReducedLinearization(self._f, s)
        return at.value, at.jacobian

    def take(self, rows: Tensor) -> ReducedEquilibrium:
        part = self._f.take(rows)
        assert isinstance(part, LowRankEquilibrium)
        return ReducedEquilibrium(part)

    def after_zero(self) -> Tensor:
        return self.rows(self._f.after_zero())

    def rows(self, x: Tensor) -> Tensor:
        return x @ self._f.R

    def state(self, rows: Tensor) -> Tensor:
        return self._f.lift(rows)

    def observed(self, x: Tensor) -> Tensor:
        return self._f.lift(x)

    def linearize(self, x: Tensor, slope: Tensor | None = None) -> Linearization:
        return ReducedLinearization(self._f, x)

    def explicit(self) -> Explicit:
        f = self._f
        phi = f.activation
        return Explicit(lambda L, R, b: ReducedEquilibrium(LowRankEquilibrium(L, R, b, phi)), (f.L, f.R), (f.b,))


class ReducedLinearization(Linearization):
    """φ(sLᵀ + b)R at s: J = Rᵀ diag(φ'(z)) L."""

    def __init__(self, f: LowRankEquilibrium, s: Tensor) -> None:
        z = torch.addmm(f.b, s, f.L.t())
        self.value = f.activation.phi(z) @ f.R
        self._L, self._R = f.L.detach(), f.R.detach()
        self._slope = f.activation.dphi(z.detach())
        self._interval = f.check_interval

    def vjp(self, v: Tensor) -> Tensor:
        return ((v @ self._R.t()) * self._slope) @ self._L

    def jvp(self, w: Tensor) -> Tensor:
        return ((w @ self._L.t()) * self._slope) @ self._R

    def jacobian(self, rows: Tensor) -> Tensor:
        """J of the samples ``rows``, (len(rows), r, r)."""
        return torch.einsum("nr,bn,ns->brs", self._R, self._slope[rows], self._L)

    def adjoint_map(self, g: Tensor) -> LinearMap:
        return ReducedAdjoint(self._L, self._R, self._slope, g, self._interval)

    def tangent_map(self, h: Tensor) -> LinearMap:
        # J and Jᵀ differ by the places of L and R.
        return ReducedAdjoint(self._R, self._L, self._slope, h, self._interval)


class ReducedAdjoint(LinearMap):
    """v ↦ g + ((vRᵀ) ∘ φ')L."""

    def __init__(self, L: Tensor, R: Tensor, slope: Tensor, g: Tensor, interval: int) -> None:
        self.L, self.R, self.slope, self.constant, self.check_interval = L, R, slope, g, interval

    def product(self, v: Tensor) -> Tensor:
        return ((v @ self.R.t()) * self.slope) @ self.L

    def __call__(self, v: Tensor, /) -> Tensor:
        return torch.addmm(self.constant, (v @ self.R.t()) * self.slope, self.L)

    def take(self, rows: Tensor) -> ReducedAdjoint:
        return ReducedAdjoint(self.L, self.R, self.slope[rows], self.constant[rows], self.check_interval)
