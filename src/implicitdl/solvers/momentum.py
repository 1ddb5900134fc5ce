"""Heavy-ball momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._internal.errors import fraction, settle
from ..equations.map import Map
from .base import Solver, damping, residual
from .state import Rows


@dataclass(slots=True)
class _Moving(Rows):
    velocity: Tensor  # (batch, d)  the last step
    size: Tensor  # (batch,)  ‖f(x) − x‖ where it was made


@dataclass(frozen=True, kw_only=True)
class Momentum(Solver):
    """x ← x + v,  v ← momentum v + damping (f(x) − x), with v = 0 again for a sample whose residual has grown.

    Heavy-ball iteration: one vector of memory and no inner products beside a norm.  On a map whose Jacobian has
    eigenvalues from 0 to ρ < 1 it needs about the square root of the steps of `Picard`, with a momentum of
    (1 − √(1 − ρ))² / ρ.  The restart keeps it from swinging where the momentum is too large for the map.

    Arguments:
        momentum: share of the last step in the next one, in [0, 1); 0 is `Picard`.
        damping: share of f(x) − x in a step, in (0, 2]; below 1 for maps that rotate.
        rtol, atol, max_steps: as for `Solver`.

    Source: Polyak, Some methods of speeding up the convergence of iteration methods (1964); the restart is that of
    O'Donoghue & Candès, Adaptive restart for accelerated gradient schemes (2015), by the residual.

    Example:
        >>> import torch
        >>> from implicitdl import Momentum, Picard, fixed_point
        >>> f = lambda x: 0.97 * x + 1
        >>> zero = torch.zeros(1, 1, dtype=torch.float64)
        >>> [int(fixed_point(f, zero, solver=s).steps) for s in (Picard(max_steps=1000), Momentum(momentum=0.7))]
        [642, 90]
    """

    momentum: float = 0.5
    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, fraction, "momentum")
        settle(self, damping, "damping")

    def init(self, f: Map, x: Tensor) -> _Moving:
        return _Moving(torch.zeros_like(x), x.new_full((len(x),), torch.inf))

    def step(self, f: Map, x: Tensor, fx: Tensor, state: _Moving) -> tuple[Tensor, Any, int]:
        r = residual(f, x, fx)
        size = torch.linalg.vector_norm(r, dim=1)
        keeps = (size <= state.size).unsqueeze(1)
        velocity = torch.where(keeps, self.momentum * state.velocity, 0.0) + self.damping * r
        return (x + velocity).to(fx.dtype), _Moving(velocity, size), 0
