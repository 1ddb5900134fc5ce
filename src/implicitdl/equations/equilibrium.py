"""The map x ↦ φ(xAᵀ + b), its Jacobian in closed form, and the linear equations of its derivative, in rows."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property, partial

import torch
from torch import Tensor

from .._internal.context import batched_by_autograd, plain
from ..activations import RELU, Activation
from ..kernels import loops as kernel
from ..kernels.loops import Swept
from .map import Explicit, Linearization, LinearMap, Splittable
from .resolvent import bounds, resolvent
from .scaling import scale_rows, scale_rows_vjp
from .triangular import substitute


class Equilibrium(Splittable):
    """x ↦ φ(xAᵀ + b), for states in rows.

    Arguments:
        A: (n, n) weights.
        b: (batch, n) input term uBᵀ + bias.
        activation: φ.
        triangular: A is strictly upper triangular, so that one substitution solves x = φ(xAᵀ + b).
        radius: A is made of the given weights by `scale_rows` onto the ℓ1 ball of this radius.  A compiled solve, which
            reads the weights anyway, makes it on the way; gradients go to the given weights.

    Attributes:
        source: the weights as they were given.
        scaled: after a compiled solve that has scaled them: A, the weights that were read, and the factors (n, 1).

    Example:
        >>> import torch
        >>> from implicitdl import Equilibrium, fixed_point
        >>> f = Equilibrium(torch.tensor([[0.0, 0.5], [0.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
        >>> fixed_point(f, torch.zeros(1, 2)).value
        tensor([[2., 2.]])
    """

    def __init__(
        self,
        A: Tensor,
        b: Tensor,
        activation: Activation = RELU,
        *,
        triangular: bool = False,
        radius: float | None = None,
    ) -> None:
        if A.dtype != b.dtype:
            # Under autocast b comes out of a product in the lower precision; A is cast once, not once a sweep.
            A, radius = (A if radius is None else scale_rows(A, radius)).to(b.dtype), None
        self.source, self.radius, self.b = A, radius, b
        self.activation, self.triangular = activation, triangular
        self.check_interval = check_interval(A.shape[0])
        self.scaled: tuple[Tensor, Tensor, Tensor] | None = None

    @cached_property
    def A(self) -> Tensor:
        """(n, n), with its graph, even where the first to ask has no use for one."""
        if self.radius is None:
            return self.source
        with torch.enable_grad():
            return scale_rows(self.source, self.radius)

    @property
    def numbers(self) -> Tensor:
        """A without a graph."""
        return self.A.detach() if self.scaled is None else self.scaled[0]

    @property
    def named_weights(self) -> dict[str, Tensor]:
        return {"A": self.source}

    @property
    def any_step(self) -> bool:  # type: ignore[override]
        return self.activation.homogeneous

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.activation.name

    @property
    def closed_form(self) -> bool:
        return True

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.activation.phi(self.affine(x))

    def affine(self, y: Tensor) -> Tensor:
        return torch.addmm(self.b, y, self.A.t())

    def after_zero(self) -> Tensor:
        """f(0), for the price of φ alone: the start that saves an evaluation."""
        return self.activation.phi(self.b.detach())

    def take(self, rows: Tensor) -> Equilibrium:
        part = copy(self)
        part.b = self.b[rows]
        return part

    def explicit(self) -> Explicit:
        build = partial(Equilibrium, activation=self.activation, triangular=self.triangular)
        return Explicit(build, (self.A,), (self.b,))

    def prepare(self) -> None:
        if self.radius is not None:
            _ = self.A

    def sweep(self, x: Tensor | None, *settings: float) -> Swept | None:
        phi = self.activation.compiled
        # A subclass that evaluates otherwise is another map.
        if phi is None or self.triangular or type(self).__call__ is not Equilibrium.__call__:
            return None
        swept = kernel.sweeps(self.source, self.radius, self.b, x, phi, None, *settings)  # type: ignore[arg-type]
        if swept is not None and swept.scaled is not None:
            # The numbers that were read: before backward, `Module.to` may give a parameter others, of another dtype.
            self.scaled = swept.scaled[0], self.source.detach(), swept.scaled[1]
        return swept

    def linearize(self, x: Tensor, slope: Tensor | None = None) -> Linearization | None:
        if slope is not None and not (self.source.requires_grad or self.b.requires_grad):
            return None
        return EquilibriumLinearization(self, x, slope)

    def jacobian(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        at = EquilibriumLinearization(self, x)
        # Of the rows asked for only: all of them together may not fit into memory.
        return at.value, lambda rows: at.slope[rows].unsqueeze(2) * self.numbers

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        return self.activation.prox(u, alpha)

    def resolvent(self, alpha: float) -> Callable[[Tensor], Tensor]:
        return resolvent(self.numbers, alpha)

    def bounds(self) -> tuple[float, float]:
        return bounds(self.numbers)

    def substitute(self) -> Tensor:
        phi = self.activation.phi
        return substitute(self.A.t(), self.b, lambda z, _: phi(z), backwards=True)


class EquilibriumLinearization(Linearization):
    """φ(xAᵀ + b) at x: J = diag(φ'(z)) A in closed form."""

    def __init__(self, f: Equilibrium, x: Tensor, slope: Tensor | None = None) -> None:
        self._f, self._x, self._slope = f, x, slope
        if slope is None:
            z = f.affine(x)
            self.value, self._z = f.activation.phi(z), z.detach()
        else:
            self.weights = f.source, f.b

    @cached_property
    def value(self) -> Tensor:  # type: ignore[override]
        return self._f(self._x)

    @property
    def slope(self) -> Tensor:
        """φ'(z), (batch, n); needed by backward only."""
        if self._slope is None:
            self._slope = self._f.activation.dphi(self._z)
        return self._slope

    def pull(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        f, slope, rows, scale = self._f, self.slope, None, None
        if f.scaled is not None:
            _, rows, scale = f.scaled
        if plain() and not torch.is_grad_enabled() and not batched_by_autograd(v):
            pulled = kernel.pull(v, slope, x, rows, scale, f.radius or 0.0)
            if pulled is not None:
                return pulled
        w = v * slope
        g = w.t() @ x
        if rows is None or scale is None or f.radius is None:
            return g, w
        return scale_rows_vjp(f.source if torch.is_grad_enabled() else rows, scale, g, f.radius), w

    def vjp(self, v: Tensor) -> Tensor:
        return (v * self.slope) @ self._f.numbers

    def jvp(self, w: Tensor) -> Tensor:
        return (w @ self._f.numbers.t()) * self.slope

    def adjoint_map(self, g: Tensor) -> LinearMap:
        return EquilibriumAdjoint(self._f.numbers, self.slope, g, self._f.triangular)

    def tangent_map(self, h: Tensor) -> LinearMap:
        return EquilibriumTangent(self._f.numbers, self.slope, h, self._f.triangular)


class EquilibriumAdjoint(LinearMap, Splittable):
    """v ↦ g + (v ∘ φ') A.

    y = φ' ∘ v solves y = φ' ∘ (yA + g), whose "activation" z ↦ φ' ∘ z has slopes in [0, 1] like φ: splitting serves
    it as it serves the equilibrium, with Aᵀ in place of A.
    """

    def __init__(self, A: Tensor, slope: Tensor, g: Tensor, triangular: bool) -> None:
        self.A, self.slope, self.constant, self.b, self.triangular = A, slope, g, g, triangular
        self.check_interval = check_interval(A.shape[0])

    def divided(self, unit: Tensor) -> LinearMap:
        part = copy(self)
        part.constant, part.b = self.constant / unit, self.b / unit
        return part

    def product(self, v: Tensor) -> Tensor:
        return (v * self.slope) @ self.A

    def __call__(self, v: Tensor, /) -> Tensor:
        return torch.addmm(self.constant, v * self.slope, self.A)

    def take(self, rows: Tensor) -> EquilibriumAdjoint:
        return EquilibriumAdjoint(self.A, self.slope[rows], self.constant[rows], self.triangular)

    def sweep(self, v: Tensor | None, *settings: float) -> Swept | None:
        if self.triangular:
            return None
        return kernel.sweeps(self.A.t(), None, self.b, v, kernel.SLOPE, self.slope, *settings)  # type: ignore[arg-type]

    def affine(self, y: Tensor) -> Tensor:
        return torch.addmm(self.b, y, self.A)

    def inner(self, v: Tensor) -> Tensor:
        return v * self.slope

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        """The v with φ' ∘ v = φ' u / (φ' + α(1 − φ')), and v = u at α = 1 whatever φ'."""
        return u / (self.slope + alpha * (1 - self.slope))

    def resolvent(self, alpha: float) -> Callable[[Tensor], Tensor]:
        return resolvent(self.A.t(), alpha)

    def bounds(self) -> tuple[float, float]:
        return bounds(self.A)

    def substitute(self) -> Tensor:
        # In s = v ∘ φ' the equation reads s = φ' ∘ (sA + g), a substitution in the other direction.
        slope = self.slope
        s = substitute(self.A, self.b, lambda z, i: z * slope[:, i], backwards=False)
        return torch.addmm(self.b, s, self.A)


class EquilibriumTangent(EquilibriumAdjoint):
    """w ↦ h + φ' ∘ (wAᵀ): y = w − h solves y = φ' ∘ (yAᵀ + hAᵀ), the adjoint's equation with A transposed."""

    def __init__(self, A: Tensor, slope: Tensor, h: Tensor, triangular: bool) -> None:
        super().__init__(A.t(), slope, h @ A.t(), triangular)
        self.constant = h

    def product(self, w: Tensor) -> Tensor:
        return (w @ self.A) * self.slope

    def __call__(self, w: Tensor, /) -> Tensor:
        return torch.addcmul(self.constant, w @ self.A, self.slope)

    def take(self, rows: Tensor) -> EquilibriumTangent:
        return EquilibriumTangent(self.A.t(), self.slope[rows], self.constant[rows], self.triangular)

    def sweep(self, v: Tensor | None, *settings: float) -> Swept | None:
        return None

    def inner(self, w: Tensor) -> Tensor:
        return w - self.constant

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        return self.constant + self.slope * super().prox(u, alpha)

    def substitute(self) -> Tensor:
        slope = self.slope
        return self.constant + substitute(self.A, self.b, lambda z, i: z * slope[:, i], backwards=True)


def check_interval(n: int) -> int:
    """Sweeps between two checks of a dense model of n states; whatever the batch, on which no sample's end depends.

    A check is some twenty small operations whose price hardly depends on n; a sweep costs 2n² flops a sample.  On a
    small model a wasted sweep is the cheaper of the two, on a large one the check is.
    """
    return 4 if n <= 128 else 3 if n <= 512 else 1
