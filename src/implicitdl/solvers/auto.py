"""The default: substitution where A is triangular, Picard where it is fast, Anderson where it is slow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..equilibrium import RowMap
from .anderson import Anderson
from .base import Solver
from .picard import Picard
from .substitution import Substitution


@dataclass(frozen=True, kw_only=True)
class _PicardWhileFast(Picard):
    """Picard that hands a sample over when its measured rate promises too many further steps."""

    overhead: int = 1

    def hand_over(self, residual: np.ndarray, previous: np.ndarray, steps: int, rtol: float) -> np.ndarray:
        # rate ** remaining = rtol / residual, the rate measured between the last two looks.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rate = (residual / previous) ** (1.0 / steps)
            remaining = np.log(rtol / residual) / np.log(rate)
        # 0.7: where acceleration begins to save evaluations on most spectra (THEORY §5.6); a residual that does
        # not fall at all (rate ≥ 1, remaining negative or NaN) is the slowest there is.
        return (rate >= 1.0) | ((rate > 0.7) & (remaining > 10 * self.overhead))


@dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """Chooses per sample: Picard with a measured rate, and Anderson for the samples on which Picard is slow.

    A sample's rate is taken from its own residuals alone, so what is chosen for it does not depend on its
    batch-mates.  A strictly triangular equilibrium is solved by substitution.

    Arguments:
        slow: the solver that takes over slow samples, at their current iterate.
        rtol, atol, max_steps: as for `Solver`; ``max_steps`` counts both stages together.

    Source: the default policy of THEORY §5.6; rates by the residual ratio.
    """

    slow: Solver = field(default_factory=Anderson)

    def stages(self, f: RowMap) -> tuple[Solver, ...]:
        if Substitution.serves(f):
            return (Substitution(),)
        # An Anderson step costs about ten small operations more than a sweep: nothing beside an f that takes
        # milliseconds, four sweeps and more where the map says that looking at a residual is expensive.
        return (_PicardWhileFast(overhead=f.check_interval), self.slow)

    def step(self, f: RowMap, x: Tensor, fx: Tensor, state: Any) -> tuple[Tensor, Any, int]:
        raise AssertionError("Auto only chooses; its stages step")
