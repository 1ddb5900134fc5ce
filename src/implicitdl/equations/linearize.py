"""f at a point: its value with the graph to the weights, and Jacobian products, from a single evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._internal.context import autocast_dtype
from .._internal.errors import wrong
from .map import Linearization, RowMap


def linearize(f: RowMap, x: Tensor, slope: Tensor | None = None) -> Linearization | None:
    """f at x with its graph to the weights: in closed form where f offers it, else by one evaluation under autograd.

    ``slope`` is what the solve already knows of the closed form.
    """
    at: Linearization | None
    closed_form = getattr(f, "linearize", None)
    if closed_form is None:
        at = _AutogradLinearization.at(f, x)
    else:
        at = closed_form(x) if slope is None else closed_form(x, slope)
    return at


class _AutogradLinearization:
    """Jacobian products of any f from a single evaluation, whose graph also serves the gradient of the weights."""

    def __init__(self, f: RowMap, x: Tensor) -> None:
        # A leaf would collect a gradient nobody asked for; behind this node nothing arrives.
        self._x = _Source.apply(x.detach().requires_grad_())
        self.value = f(self._x)
        self._f = f
        self.parts, self.root = getattr(f, "parts", None), getattr(f, "root", False)
        # Products are asked for in backward, outside of the user's autocast region.
        self.precision = autocast_dtype(x.device)
        self._autocast = partial(torch.autocast, x.device.type, self.precision, self.precision is not None)

    @classmethod
    def at(cls, f: RowMap, x: Tensor) -> _AutogradLinearization | None:
        """None when nothing but x itself requires a gradient."""
        self = cls(f, x)
        return self if _depends_on_more_than(self.value, self._x) else None

    def take(self, rows: Tensor) -> _AutogradLinearization | None:
        """The same for some of the samples, by one more evaluation of f: a graph belongs to its whole batch.

        None where f cannot be divided, or is not what it was any more: a value that differs by more than rounding
        tells of something that was changed since.
        """
        f = self._f.take(rows)
        if f is None:
            return None
        with torch.enable_grad(), self._autocast():
            part = _AutogradLinearization(f, self._x.detach().index_select(0, rows))
        before, now = self.value.detach().index_select(0, rows).float(), part.value.detach().float()
        # Rounding depends on the batch size, through the order of sums.
        same = (now - before).norm() <= torch.finfo(self.value.dtype).eps ** 0.5 * before.norm()
        return part if bool(same) else None

    def vjp(self, v: Tensor) -> Tensor:
        return vjp(self.value, self._x, v, create_graph=False)

    def jvp(self, w: Tensor) -> Tensor:
        """By transposing v ↦ Jᵀv, which is linear: forward mode is missing for too many operations."""
        with torch.enable_grad():
            v = torch.zeros_like(self.value, requires_grad=True)
            Jtv = vjp(self.value, self._x, v, create_graph=True)
        if not Jtv.requires_grad:
            return torch.zeros_like(w)
        return vjp(Jtv, v, w, create_graph=False)

    def adjoint_map(self, g: Tensor) -> RowMap:
        return _LinearMap(self, _AutogradLinearization.vjp, g)

    def tangent_map(self, h: Tensor) -> RowMap:
        return _LinearMap(self, _AutogradLinearization.jvp, h)


class _LinearMap:
    """v ↦ g + Jᵀv or w ↦ h + J w."""

    check_interval = 1
    linear = True

    def __init__(
        self, at: _AutogradLinearization, product: Callable[[_AutogradLinearization, Tensor], Tensor], g: Tensor
    ) -> None:
        self._at, self._product, self._g = at, product, g
        self.precision = at.precision
        self.parts, self.root = at.parts, at.root

    def __call__(self, v: Tensor) -> Tensor:
        return self._g + self._product(self._at, v)

    @property
    def constant(self) -> Tensor:
        """The value at 0."""
        return self._g

    def product(self, v: Tensor) -> Tensor:
        """Jᵀv, or J v."""
        return self._product(self._at, v)

    def take(self, rows: Tensor) -> RowMap | None:
        at = self._at.take(rows)
        return None if at is None else _LinearMap(at, self._product, self._g.index_select(0, rows))


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


def _depends_on_more_than(y: Tensor, x: Tensor) -> bool:
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
