"""The map x ↦ φ(xAᵀ + b) and its linearisation in closed form.  Rows are samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ._context import only_numbers
from .activations import HARDTANH, IDENTITY, LEAKY_RELU, RELU, Activation
from .kernels import sweeps as kernel
from .kernels.pull import pull
from .kernels.sweeps import Swept
from .resolvent import bounds, resolvent
from .weights import Given, ScaledRows, Weight


class RowMap(Protocol):
    """What the loop iterates: rows to rows, each row on its own."""

    #: Evaluations between two looks at the residual.  A look costs about as much as a sweep of a small model.
    check_interval: int

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def take(self, rows: Tensor) -> RowMap | None:
        """The same map for some of the samples; None when data hides in a closure and cannot be indexed."""


class Linearization(Protocol):
    """f at a point: its value, with the graph to the weights, and products with its Jacobian J."""

    value: Tensor

    def vjp(self, v: Tensor) -> Tensor:
        """Jᵀv, one row per sample."""

    def jvp(self, w: Tensor) -> Tensor:
        """J w, one row per sample."""

    def adjoint_map(self, g: Tensor) -> RowMap:
        """v ↦ g + Jᵀv."""

    def tangent_map(self, h: Tensor) -> RowMap:
        """w ↦ h + J w."""


@dataclass(frozen=True)
class Explicit:
    """A map as a function of its tensors, ``build(*weights, *rows)``, which is what torch.func's transforms need."""

    build: Callable[..., RowMap]
    weights: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


def check_interval(n: int) -> int:
    """Sweeps between two looks, from n alone so that a sample's answer never depends on its batch.

    A look is some twenty small operations whose price hardly depends on n; a sweep costs 2n² flops a sample.  On a
    small model a wasted sweep is the cheaper of the two, on a large one the look is.
    """
    return 4 if n <= 128 else 3 if n <= 512 else 1


# The activations that the compiled loop knows.
_COMPILED = {
    id(RELU): kernel.RELU, id(LEAKY_RELU): kernel.LEAKY_RELU, id(IDENTITY): kernel.IDENTITY,
    id(HARDTANH): kernel.HARDTANH,
}  # fmt: skip


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
        phi = _COMPILED.get(id(self.activation))
        # A subclass is another map.
        if phi is None or type(self) is not Equilibrium:
            return None
        weight = self.weight
        swept = kernel.sweeps(weight.source, weight.radius, self.b, x, phi, None, *settings)
        if swept is not None and isinstance(weight, ScaledRows):
            weight.made = swept.scaled
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
        return _substitute(self._At, self.b, lambda z, _: phi(z), backwards=True)


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
            _, scale = weight.made or (None, None)
            pulled = pull(v, self.slope, x, None if scale is None else weight.source, scale, weight.radius or 0.0)
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
        s = _substitute(self.A, self.g, lambda z, i: z * slope[:, i], backwards=False)
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
        return self.h + _substitute(self.A, self.g, lambda z, i: z * slope[:, i], backwards=True)


# Columns of x settled before the rest is updated by one matrix product: large enough that the products dominate,
# small enough that the rank-one updates inside a block stay in cache.
_BLOCK = 32


def _substitute(M: Tensor, b: Tensor, phi: Callable[[Tensor, int], Tensor], *, backwards: bool) -> Tensor:
    """Solve x_i = φ_i(b_i + Σ_j x_j M_ji), M strictly triangular, column by column.

    With ``backwards`` M is strictly lower triangular (column i needs the later ones), otherwise strictly upper.
    """
    n = M.shape[0]
    x = torch.empty_like(b)
    starts = range(0, n, _BLOCK)
    for start in reversed(starts) if backwards else starts:
        stop = min(start + _BLOCK, n)
        settled = slice(stop, n) if backwards else slice(0, start)
        z = torch.addmm(b[:, start:stop], x[:, settled], M[settled, start:stop])
        columns = range(stop - 1, start - 1, -1) if backwards else range(start, stop)
        for i in columns:
            x[:, i] = phi(z[:, i - start], i)
            open_ = slice(start, i) if backwards else slice(i + 1, stop)
            z[:, open_.start - start : open_.stop - start].addr_(x[:, i], M[i, open_])
    return x
