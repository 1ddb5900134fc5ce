"""The solution with a derivative of its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..equations.linearize import vjp
from ..equations.map import RowMap
from .backward import BackwardSolve, first_order
from .cotangents import many
from .guard import FirstOrderOnly


def second_order(f: RowMap, fx: Tensor, x: Tensor, backward: BackwardSolve) -> Tensor:
    """x* = x + S(f(x) − x), S = (I − J(x))⁻¹ with a derivative of its own; exact to second order.

    One Newton step doubles the order of a derivative as it doubles digits.  Take x exact to first order; then
    w = f(x) − x = 0 and dw = ∂f + (J − I)dx, so the first derivative dx + S dw = S ∂f does not depend on dx, and
    the second needs no more than dx, dS and d²f.  In the first backward the cotangents that reach x cancel,
    g + Jᵀv − v = 0; in the second they carry what depends on x.
    """
    point: Tensor
    point, first_order_part = _Point.apply(fx, x, backward)
    solution: Tensor = _NewtonStep.apply(f(point), point, first_order_part, x, backward)
    return solution


class _Point(torch.autograd.Function):
    """x*, exact to first order, for f to be evaluated at, beside an outlet for the cotangent to be cancelled there.

    f's first derivative sends Jᵀv into the point, and `_NewtonStep` sends −Jᵀv into the outlet.  Apart, one can see
    that their sum is rounding, and stop: the first backward then costs no second solve and meets no guard.
    """

    @staticmethod
    def forward(ctx: Any, fx: Tensor, x: Tensor, backward: BackwardSolve) -> tuple[Tensor, Tensor]:
        ctx.solve = backward
        ctx.save_for_backward(fx)
        return x.detach(), torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, from_f: Tensor, first_order_part: Tensor) -> tuple[Tensor | None, ...]:
        g = from_f + first_order_part
        # A thousand roundings: both sides are the same product, summed by f's graph in an order of its own.
        rounding = 1e3 * torch.finfo(g.dtype).eps * first_order_part.abs().amax(dim=1)
        if not many(g) and bool((g.abs().amax(dim=1) <= rounding).all()):
            return None, None, None
        return first_order(ctx, g), None, None


class _NewtonStep(torch.autograd.Function):
    """x + S(f(x) − x), where f(x) = x: the value is x, backward is the adjoint solve, differentiable."""

    @staticmethod
    def forward(
        ctx: Any, fx: Tensor, point: Tensor, first_order_part: Tensor, x: Tensor, backward: BackwardSolve
    ) -> Tensor:
        ctx.solve = backward
        ctx.save_for_backward(fx, point)
        return x.clone()  # the user may change it in place, and backward reads the point

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        v = ctx.solve(g)
        fx, point = ctx.saved_tensors
        Jtv = vjp(fx, point, v, create_graph=torch.is_grad_enabled())
        if torch.is_grad_enabled():
            left = g + Jtv if getattr(ctx.solve.at, "root", False) else g + Jtv - v
            v = v + _TransposedSolve.apply(left, fx, ctx.solve)
        with torch.no_grad():
            cancelling = -Jtv
        return v, None, cancelling, None, None


class _TransposedSolve(torch.autograd.Function):
    """r ↦ (I − Jᵀ)⁻¹ r at r = 0, the derivative of v = g + Jᵀv; first order only."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, fx: Tensor, backward: BackwardSolve) -> Tensor:
        ctx.solve = backward
        ctx.save_for_backward(fx)
        return torch.zeros_like(r)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        w = ctx.solve.transposed(h)
        if torch.is_grad_enabled():
            w = FirstOrderOnly.apply(w, h, *ctx.saved_tensors)
        return w, None, None
