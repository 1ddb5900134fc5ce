"""The equilibrium with A = LRᵀ, and the same equation in the r dimensions in which it is solved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import RELU, Activation
from .equilibrium import Equilibrium
from .map import Explicit, check_interval


class LowRankEquilibrium(Equilibrium):
    """x ↦ φ(xAᵀ + b) with A = LRᵀ, never formed; `reduced` is the same equation in r dimensions.

    Arguments:
        L, R: (n, r).
        b: (batch, n).
        activation: φ.
    """

    def __init__(self, L: Tensor, R: Tensor, b: Tensor, activation: Activation = RELU) -> None:
        self.L, self.R, self.b = L.to(b.dtype), R.to(b.dtype), b
        self.activation, self.triangular = activation, False
        self.check_interval = check_interval(L.shape[0])

    @property
    def named_weights(self) -> dict[str, Tensor]:
        return {"L": self.L, "R": self.R}

    def __call__(self, x: Tensor) -> Tensor:
        return self.lift(x @ self.R)

    def take(self, rows: Tensor) -> LowRankEquilibrium:
        return LowRankEquilibrium(self.L, self.R, self.b[rows], self.activation)

    def lift(self, s: Tensor) -> Tensor:
        """x = φ(sLᵀ + b) of the reduced state s = xR."""
        return self.activation.phi(torch.addmm(self.b, s, self.L.t()))

    def problem(self) -> ReducedEquilibrium:
        return ReducedEquilibrium(self)

    def linearize(self, x: Tensor, slope: Tensor | None = None) -> Any:
        raise AssertionError("a low-rank equilibrium is solved, and differentiated, in its reduced form")


class ReducedEquilibrium:
    """s ↦ φ(sLᵀ + b)R: x = φ(xRLᵀ + b) holds exactly when s = xR is its fixed point and x = φ(sLᵀ + b)."""

    def __init__(self, f: LowRankEquilibrium) -> None:
        self._f = f
        self.check_interval = f.check_interval

    def __call__(self, s: Tensor) -> Tensor:
        return self._f.lift(s) @ self._f.R

    def take(self, rows: Tensor) -> ReducedEquilibrium:
        return ReducedEquilibrium(self._f.take(rows))

    def enter(self, x: Tensor | None) -> Tensor:
        return (self._f.after_zero() if x is None else x) @ self._f.R

    def leave(self, s: Tensor) -> Tensor:
        return self._f.lift(s)

    def observed(self, s: Tensor) -> Tensor:
        """What the residual is measured on: x, which is returned, and not s."""
        return self._f.lift(s)

    def linearize(self, s: Tensor) -> ReducedLinearization:
        return ReducedLinearization(self._f, s)

    def explicit(self) -> Explicit:
        f = self._f
        phi = f.activation
        return Explicit(lambda L, R, b: LowRankEquilibrium(L, R, b, phi).problem(), (f.L, f.R), (f.b,))


class ReducedLinearization:
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

    def adjoint_map(self, g: Tensor) -> ReducedAdjoint:
        return ReducedAdjoint(self._L, self._R, self._slope, g, self._interval)

    def tangent_map(self, h: Tensor) -> ReducedAdjoint:
        # J and Jᵀ differ by the places of L and R.
        return ReducedAdjoint(self._R, self._L, self._slope, h, self._interval)


class ReducedAdjoint:
    """v ↦ g + ((vRᵀ) ∘ φ')L, linear."""

    def __init__(self, L: Tensor, R: Tensor, slope: Tensor, g: Tensor, interval: int) -> None:
        self.L, self.R, self.slope, self.g, self.check_interval = L, R, slope, g, interval

    def __call__(self, v: Tensor) -> Tensor:
        return torch.addmm(self.g, (v @ self.R.t()) * self.slope, self.L)

    def take(self, rows: Tensor) -> ReducedAdjoint:
        return ReducedAdjoint(self.L, self.R, self.slope[rows], self.g[rows], self.check_interval)
