"""GMRES, per sample, for maps that are affine in x: the adjoint's v ↦ g + Jᵀv first of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._internal.errors import positive_int, settle
from ..equations.map import Map
from .base import Solver, residual, smallest_part
from .krylov import Krylov, refuse_graph


@dataclass(frozen=True, kw_only=True)
class GMRES(Solver):
    """The minimiser of ‖f(x) − x‖ over x₀ + span{r, Mr, …, Mᵏ⁻¹r}, M = I − J, for an affine f.

    It needs no contraction: any J without the eigenvalue 1 will do, in at most as many products as M has distinct
    eigenvalues that r takes part in, if ``restart`` allows that many.  A product is one evaluation of f, beside the
    point; the step itself is formed once, at the end of a cycle, and then evaluated: the residual that is tested is
    the true one.  Within a cycle a trace shows the residuals of the probes.

    On a map that is not affine the products are differences, and a cycle is a Newton–Krylov step without safeguard;
    `Newton` has one.

    Arguments:
        restart: the largest number of products in a cycle; restart + 1 states of memory.
        rtol, atol, max_steps: as for `Solver`.

    Source: Saad & Schultz, GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems
    (1986).

    Example:
        >>> import torch
        >>> from implicitdl import GMRES, fixed_point
        >>> turn = torch.tensor([[0.0, -5.0], [5.0, 0.0]], dtype=torch.float64)
        >>> b = torch.ones(1, 2, dtype=torch.float64)
        >>> solution = fixed_point(lambda x, b: x @ turn.t() + b, torch.zeros_like(b), b, solver=GMRES())
        >>> bool(solution.converged), int(solution.steps)
        (True, 4)
    """

    restart: int = 20

    by_residual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive_int, "restart")

    def init(self, f: Map, x: Tensor) -> Krylov:
        return Krylov.start(x, self.restart, self.max_steps)

    def step(self, f: Map, x: Tensor, fx: Tensor, state: Krylov) -> tuple[Tensor, Krylov, int]:
        search = state.search
        refuse_graph("GMRES", fx)
        r = residual(f, x, fx)
        tried = state.tried
        state.extend(r)
        size = torch.linalg.vector_norm(r, dim=1)
        search.accept(tried, x, r, size)
        # The residual of the recurrence and the true one agree to rounding; a tenth is left for what they differ by.
        scale = smallest_part(f, fx).to(size.dtype)
        # In a root problem the residual has other units than x, along which the probe goes.
        h = torch.maximum(torch.linalg.vector_norm(search.x, dim=1), size) if f.root else size
        state.begin(tried, h=h, enough=0.9 * (self.atol + self.tolerance(fx.dtype) * scale))
        return state.point().to(fx.dtype), state, 0
