"""Picard iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .._internal.errors import settle
from ..equations.map import Map
from .base import Solver, damping


@dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """x ← x + damping (f(x) − x).

    Converges for every contraction, at the rate of the spectral radius of f's Jacobian at the solution.

    Arguments:
        damping: 1 is plain iteration; below 1 averages (the way for maps that rotate), above 1 extrapolates.
        rtol, atol, max_steps: as for `Solver`.

    Example:
        >>> import torch
        >>> from implicitdl import Picard, fixed_point
        >>> solution = fixed_point(torch.cos, torch.zeros(1, 1), solver=Picard(rtol=1e-6))
        >>> round(float(solution.value), 4)
        0.7391
    """

    damping: float = 1.0

    leaps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, damping, "damping")

    def check_interval(self, f: Map) -> int:
        return f.check_interval

    def step(self, f: Map, x: Tensor, fx: Tensor, state: Any) -> tuple[Tensor, Any, int]:
        return (fx if self.damping == 1.0 else x.lerp(fx, self.damping)), None, 0
