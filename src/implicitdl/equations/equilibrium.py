"""The map x ↦ φ(xAᵀ + b) and its linearisation in closed form.  Rows are samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .._internal.context import only_numbers
from ..activations import RELU, Activation
from ..kernels import sweeps as kernel
from ..kernels.pull import pull
from ..kernels.sweeps import Swept
from .linear_maps import EquilibriumAdjoint, EquilibriumTangent
from .map import Explicit, check_interval
from .resolvent import bounds, resolvent
from .triangular import substitute
from .weights import Given, ScaledRows, Weight


class Equilibrium:
    """x ↦ φ(xAᵀ + b), for states in rows.

    Arguments:
        A: (n, n) weights, there or still to be made.
        b: (batch, n) input term uBᵀ + bias.
        activation: φ.
        triangular: A is strictly upper triangular, so that one substitution solves x = φ(xAᵀ + b).

    Example:
        >>> import torch
        >>> from implicitdl import Equilibrium, fixed_point
        >>> f = Equilibrium(torch.tensor([[0.0, 0.5], [0.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
        >>> fixed_point(f, torch.zeros(1, 2)).value
        tensor([[2., 2.]])
    """

    def __init__(
        self, A: Tensor | Weight, b: Tensor, activation: Activation = RELU, *, triangular: bool = False
    ) -> None:
        # Under autocast b comes out of a product in the lower precision; A is cast once, not once a sweep.
        weight = Given(A) if isinstance(A, Tensor) else A
        self.weight: Weight = weight if weight.source.dtype == b.dtype else Given(weight.value.to(b.dtype))
        self.b, self.activation, self.triangular = b, activation, triangular
        self.check_interval = check_interval(weight.source.shape[0])

    @property
    def A(self) -> Tensor:
        return self.weight.value

    @property
    def named_weights(self) -> dict[str, Tensor]:
        """What f is made of besides b, as the user gave it."""
        return {"A": self.weight.source}

    @property
    def _At(self) -> Tensor:
        # Not kept: a view that is made without grad has none later.
        return self.A.t()

    def __call__(self, x: Tensor) -> Tensor:
        return self.activation.phi(torch.addmm(self.b, x, self._At))

    def after_zero(self) -> Tensor:
        """f(0), for the price of φ alone: the start that saves an evaluation."""
        return self.activation.phi(self.b.detach())

    def take(self, rows: Tensor) -> Equilibrium:
        return Equilibrium(self.weight, self.b[rows], self.activation, triangular=self.triangular)

    def sweeps(self, x: Tensor | None, *settings: Any) -> Swept | None:
        """Every row iterated from x by the compiled loop, where there is one for this φ and place."""
        phi = self.activation.compiled
        # A subclass is another map.
        if phi is None or type(self) is not Equilibrium:
            return None
        weight = self.weight
        swept = kernel.sweeps(weight.source, weight.radius, self.b, x, phi, None, *settings)
        if swept is not None and swept.scaled is not None and isinstance(weight, ScaledRows):
            weight.made(*swept.scaled)
        return swept

    def linearize(self, x: Tensor, slope: Tensor | None = None) -> EquilibriumLinearization:
        """At x, where a solve may have left φ' for nothing."""
        return EquilibriumLinearization(self, x, slope)

    def explicit(self) -> Explicit:
        build = partial(Equilibrium, activation=self.activation, triangular=self.triangular)
        return Explicit(build, (self.A,), (self.b,))

    def problem(self) -> Any:
        """The map to iterate, with `enter` and `leave` between its state and x."""
        return self

    def enter(self, x: Tensor | None) -> Tensor | None:
        """The state that x is; None, which is f(0), may stay what it is."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x

    def affine(self, y: Tensor) -> Tensor:
        return torch.addmm(self.b, y, self._At)

    def inner(self, x: Tensor) -> Tensor:
        return x

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        return self.activation.prox(u, alpha)

    def resolvent(self, alpha: float) -> Callable[[Tensor], Tensor]:
        return resolvent(self.weight.numbers, alpha)

    def bounds(self) -> tuple[float, float]:
        return bounds(self.weight.numbers)

    def substitute(self) -> Tensor | None:
        """The solution by one pass of back substitution, exact; None when A is not triangular."""
        if not self.triangular:
            return None
        phi = self.activation.phi
        return substitute(self._At, self.b, lambda z, _: phi(z), backwards=True)


class EquilibriumLinearization:
    """φ(xAᵀ + b) at x: J = diag(φ'(z)) A in closed form, in place of autograd products."""

    def __init__(self, f: Equilibrium, x: Tensor, slope: Tensor | None = None) -> None:
        self._f, self._x, self._slope = f, x, slope
        # What the value depends on, where `pull` does the work of its graph.
        self.weights = None if slope is None else (f.weight.source, f.b)
        if slope is None:
            z = torch.addmm(f.b, x, f._At)
            self.value, self._z = f.activation.phi(z), z.detach()

    @cached_property
    def value(self) -> Tensor:
        return self._f(self._x)

    @property
    def slope(self) -> Tensor:
        """φ'(z), (batch, n); needed by backward only."""
        if self._slope is None:
            self._slope = self._f.activation.dphi(self._z)
        return self._slope

    def pull(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The cotangents of `weights` that a cotangent v of the value at x makes."""
        weight = self._f.weight
        if only_numbers(v):
            pulled = pull(v, self.slope, x, *weight.scaling())
            if pulled is not None:
                return pulled
        w = v * self.slope
        return weight.pull(w.t() @ x), w

    def jacobian(self, rows: Tensor) -> Tensor:
        """J of the samples ``rows``, (len(rows), n, n)."""
        return self.slope[rows].unsqueeze(2) * self._f.weight.numbers

    def vjp(self, v: Tensor) -> Tensor:
        return (v * self.slope) @ self._f.weight.numbers

    def jvp(self, w: Tensor) -> Tensor:
        return (w @ self._f.weight.numbers.t()) * self.slope

    def adjoint_map(self, g: Tensor) -> EquilibriumAdjoint:
        return EquilibriumAdjoint(self._f.weight.numbers, self.slope, g, self._f.triangular)

    def tangent_map(self, h: Tensor) -> EquilibriumTangent:
        return EquilibriumTangent(self._f.weight.numbers, self.slope, h, self._f.triangular)
