"""Maps: what is solved, x = f(x) on rows, and the structure that each map declares of itself.

A row is one sample, (batch, d) in all.  Solvers and adjoints ask a map for nothing that is not declared here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._internal.context import autocast_dtype
from .._internal.errors import wrong
from ..kernels.loops import Swept

# A part of a state: the columns that it takes in a row.
Columns = slice | Tensor


class Map(ABC):
    """x ↦ f(x) on rows, each sample on its own.

    A map needs `__call__`.  `take` lets finished samples leave the batch, `linearize` replaces autograd's Jacobian
    products by a closed form, and the other members say what a map can do besides.

    Attributes:
        check_interval: evaluations from one check of the residual to the next.
        precision: dtype in which f computes, where that is coarser than its values (autocast); None elsewhere.
        parts: columns of each part of a state in parts, which meet the tolerance one by one; None of a single part.
        root: f is −g of a root problem g(x) = 0.  Its value is the residual and not the next x.
        triangular: `substitute` solves the map in one pass.

    Example:
        >>> import torch
        >>> from implicitdl.equations.map import Map
        >>> class Halving(Map):
        ...     def __call__(self, x):
        ...         return 0.5 * x + 1
        >>> Halving()(torch.zeros(1, 2))
        tensor([[1., 1.]])
    """

    check_interval: int = 1
    precision: torch.dtype | None = None
    parts: tuple[Columns, ...] | None = None
    root: bool = False
    triangular: bool = False

    @abstractmethod
    def __call__(self, x: Tensor, /) -> Tensor:
        """f(x), (batch, d)."""

    def take(self, rows: Tensor) -> Map | None:
        """The map of some of the samples, by their numbers; None where it cannot be divided."""
        return None

    def linearize(self, x: Tensor, slope: Tensor | None = None) -> Linearization | None:
        """f at x with Jacobian products and its graph to the weights; None where no weight requires a gradient.

        Arguments:
            x: (batch, d).
            slope: (batch, d)  φ' at x where a compiled solve has computed it.
        """
        at = AutogradLinearization(self, x)
        return at if depends_on_more_than(at.value, at.x) else None

    def jacobian(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """f(x), and a function from sample numbers to their Jacobians, (len(rows), d, d)."""
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            value = self(point)
        if not value.requires_grad:
            raise wrong(
                "Newton", "f differentiable by autograd", "a value without a graph",
                "Remove what detaches it, or pass dense=False, which needs no derivative.",
            )  # fmt: skip
        return value, once(lambda: by_products(lambda v: vjp(value, point, v, create_graph=False), value, 1))

    @property
    def closed_form(self) -> bool:
        """Whether Jacobians need no autograd."""
        return False

    def rows(self, x: Any) -> Tensor:
        """The state of the user as rows."""
        state: Tensor = x
        return state

    def state(self, rows: Tensor) -> Any:
        """Rows as a state of the user."""
        return rows

    def explicit(self) -> Explicit:
        """The map as a function of its tensors, for torch.func's transforms."""
        raise NotImplementedError(f"{type(self).__name__} is not known as a function of its tensors")

    def reduced(self) -> Map:
        """The map to iterate instead, whose `rows` and `state` translate the states of this one."""
        return self

    @property
    def named_weights(self) -> dict[str, Tensor]:
        """The tensors of f besides b, by name, as the user gave them."""
        return {}

    def prepare(self) -> None:  # noqa: B027  (most maps share nothing)
        """Make what all evaluations share, before one of them is recorded."""

    def observed(self, x: Tensor) -> Tensor:
        """What the residual is measured on: x, except where another state is iterated than is returned."""
        return x

    def after_zero(self) -> Tensor:
        """f(0), the start of a solve without x0."""
        raise NotImplementedError(f"{type(self).__name__} needs a start")

    def substitute(self) -> Tensor:
        """The exact solution, (batch, d), of a `triangular` map."""
        raise NotImplementedError(f"{type(self).__name__} is not triangular")


class Splittable(Map):
    """x = φ(Ax + b) with A known, φ the proximal operator of a convex function: what operator splitting needs.

    The state of the map is x, that of the splitting is y with x = φ(Ay + b); `inner` turns x into y.

    Attributes:
        b: (batch, d).
        any_step: φ is positively homogeneous, so that prox_αf is known for every α > 0, and not for α = 1 only.
        name: that of φ, for errors.
    """

    b: Tensor
    any_step: bool = True
    name: str = "linear"

    @abstractmethod
    def affine(self, y: Tensor) -> Tensor:
        """Ay + b, (batch, d)."""

    def inner(self, x: Tensor) -> Tensor:
        """y of the state x."""
        return x

    @abstractmethod
    def prox(self, u: Tensor, alpha: float) -> Tensor:
        """The state x that belongs to prox_αf(u)."""

    @abstractmethod
    def resolvent(self, alpha: float) -> Callable[[Tensor], Tensor]:
        """u ↦ (I + α(I − A))⁻¹u."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """(m, L) with I − A ⪰ mI and ‖I − A‖₂ ≤ L."""

    def sweep(
        self, x: Tensor | None, rtol: float, atol: float, budget: int, period: int, fast: float, patience: int
    ) -> Swept | None:
        """The compiled Picard–Aitken loop on all rows from x; None where there is none for this map.

        The arguments are those of `kernels.loops.sweeps`.
        """
        return None


class LinearMap(Map):
    """v ↦ c + Mv, M = Jᵀ in the adjoint equation and M = J in the tangent equation.

    Attributes:
        constant: c, (batch, d).
    """

    constant: Tensor

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """Mv, (batch, d)."""

    def __call__(self, v: Tensor, /) -> Tensor:
        return self.constant + self.product(v)

    def after_zero(self) -> Tensor:
        return torch.zeros_like(self.constant) if self.root else self.constant

    def divided(self, unit: Tensor) -> LinearMap:
        """The map of v / unit, (batch, 1) powers of two."""
        part = copy(self)
        part.constant = self.constant / unit
        return part

    @property
    def closed_form(self) -> bool:
        return True

    def jacobian(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        value = self(x)
        return value, once(lambda: by_products(self.product, value, 2))


class Linearization(ABC):
    """f at a point x: its value with the graph to the weights, and products with its Jacobian J.

    Attributes:
        value: f(x), (batch, d), with its graph.
        weights: tensors whose gradients `pull` gives; None where the graph of ``value`` has to give them.
        root: as of the map.
    """

    value: Tensor
    weights: tuple[Tensor, ...] | None = None
    root: bool = False

    @abstractmethod
    def vjp(self, v: Tensor) -> Tensor:
        """Jᵀv, (batch, d)."""

    @abstractmethod
    def jvp(self, w: Tensor) -> Tensor:
        """Jw, (batch, d)."""

    @abstractmethod
    def adjoint_map(self, g: Tensor) -> LinearMap:
        """v ↦ g + Jᵀv."""

    @abstractmethod
    def tangent_map(self, h: Tensor) -> LinearMap:
        """w ↦ h + Jw."""

    def pull(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """The gradients of ``weights`` for a cotangent v of the value at x."""
        raise NotImplementedError(f"{type(self).__name__} has a graph")


@dataclass(frozen=True)
class Explicit:
    """A map as a function of its tensors, ``build(*weights, *rows)``, which is what torch.func's transforms need."""

    build: Callable[..., Map]
    weights: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


def by_products(product: Callable[[Tensor], Tensor], like: Tensor, dim: int) -> Tensor:
    """The matrices of a product, (batch, d, d): a product for every unit vector, stacked along ``dim``."""
    unit = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return torch.stack([product(row.expand_as(like).contiguous()) for row in unit], dim=dim).detach()


def once(make: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """Rows of a tensor that is made when it is first asked for."""
    made: list[Tensor] = []

    def rows(which: Tensor) -> Tensor:
        if not made:
            made.append(make())
        return made[0][which]

    return rows


class AutogradLinearization(Linearization):
    """Jacobian products of any f from a single evaluation, whose graph also gives the gradients of the weights.

    Attributes:
        x: the point, (batch, d), inside the graph.
    """

    def __init__(self, f: Map, x: Tensor) -> None:
        # A leaf would collect a gradient that nobody asked for; nothing arrives behind this node.
        self.x: Tensor = _Source.apply(x.detach().requires_grad_())
        self.value = f(self.x)
        self._f, self.parts, self.root = f, f.parts, f.root
        # Products are asked for in backward, outside of the user's autocast region.
        self.precision = autocast_dtype(x.device)

    def take(self, rows: Tensor) -> AutogradLinearization | None:
        """The linearisation of some of the samples, by one more evaluation: a graph belongs to its whole batch.

        None where f cannot be divided, or has changed since: then its value differs by more than rounding.
        """
        f = self._f.take(rows)
        if f is None:
            return None
        with torch.enable_grad(), torch.autocast(self.x.device.type, self.precision, self.precision is not None):
            part = AutogradLinearization(f, self.x.detach().index_select(0, rows))
        before, now = self.value.detach().index_select(0, rows).float(), part.value.detach().float()
        # Rounding depends on the batch size, through the order of sums.
        same = (now - before).norm() <= torch.finfo(self.value.dtype).eps ** 0.5 * before.norm()
        return part if bool(same) else None

    def vjp(self, v: Tensor) -> Tensor:
        return vjp(self.value, self.x, v, create_graph=False)

    def jvp(self, w: Tensor) -> Tensor:
        """By transposing v ↦ Jᵀv, which is linear: forward mode is missing for too many operations."""
        with torch.enable_grad():
            v = torch.zeros_like(self.value, requires_grad=True)
            Jtv = vjp(self.value, self.x, v, create_graph=True)
        if not Jtv.requires_grad:
            return torch.zeros_like(w)
        return vjp(Jtv, v, w, create_graph=False)

    def adjoint_map(self, g: Tensor) -> LinearMap:
        return _AutogradLinearMap(self, AutogradLinearization.vjp, g)

    def tangent_map(self, h: Tensor) -> LinearMap:
        return _AutogradLinearMap(self, AutogradLinearization.jvp, h)


class _AutogradLinearMap(LinearMap):
    """v ↦ g + Jᵀv or w ↦ h + Jw."""

    def __init__(
        self, at: AutogradLinearization, product: Callable[[AutogradLinearization, Tensor], Tensor], constant: Tensor
    ) -> None:
        self._at, self._product, self.constant = at, product, constant
        self.precision, self.parts, self.root = at.precision, at.parts, at.root

    def product(self, v: Tensor) -> Tensor:
        return self._product(self._at, v)

    def take(self, rows: Tensor) -> LinearMap | None:
        at = self._at.take(rows)
        return None if at is None else _AutogradLinearMap(at, self._product, self.constant.index_select(0, rows))


class _Source(torch.autograd.Function):
    """Identity that lets no gradient through: the point of linearisation is not a variable of the user's.

    A copy, since the user may change the solution in place, and f's graph keeps this one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


def vjp(y: Tensor, x: Tensor, v: Tensor, *, create_graph: bool) -> Tensor:
    """(∂y/∂x)ᵀv; zero where y does not depend on x."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    with torch.enable_grad():
        try:
            (product,) = torch.autograd.grad(y, x, v, retain_graph=True, create_graph=create_graph, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise _reentrant() from error
            raise
    return torch.zeros_like(x) if product is None else product


def _reentrant() -> Exception:
    return wrong(
        "backward", "checkpoint(..., use_reentrant=False) inside f", "use_reentrant=True",
        "Its weights get a gradient in .backward() alone, and an adjoint solve asks for products.",
    )  # fmt: skip


def depends_on_more_than(y: Tensor, x: Tensor) -> bool:
    """Whether the graph of y holds a node that is not between y and x, found at the first leaf that is not x's."""
    behind_x = x.grad_fn
    seen, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node is behind_x or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":  # its weights are not in the graph
            raise _reentrant()
        seen.add(node)
        if not node.next_functions:  # an AccumulateGrad: a leaf
            return True
        stack.extend(parent for parent, _ in node.next_functions)
    return False
