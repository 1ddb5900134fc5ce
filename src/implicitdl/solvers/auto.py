"""The default: substitution where A is triangular, Picard with Aitken steps where that is fast, else Anderson."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..equations.map import Map, Splittable
from ..kernels.loops import Swept
from .aitken import Aitken
from .anderson import Anderson
from .base import Solver
from .substitution import Substitution

# The rate a step where acceleration begins to save evaluations on most spectra (docs/theory.md §5.2).
_FAST = 0.7
# How many steps more a slow sample may take, in units of what a step of the next stage costs.
_PATIENCE = 10
# Of the compiled loop, in which a sweep costs a fraction of one by torch, and an Aitken step nothing beside it.
_COMPILED_PATIENCE = 40
_COMPILED_PERIOD = 2


class CompiledSweeps(NamedTuple):
    """Picard iteration with Aitken steps, of all samples in one call of a compiled loop, to a solver's tolerance."""

    solver: Solver

    def solve(self, f: Map, x: Tensor | None) -> Swept | None:
        """All samples from x, or from f(0); None where there is no compiled loop for f here."""
        if not isinstance(f, Splittable):
            return None
        solver, patience = self.solver, _COMPILED_PATIENCE * f.check_interval
        rtol, budget = solver.tolerance(f.b.dtype), solver.max_steps - 1  # the next method evaluates what is left
        return f.sweep(x, rtol, solver.atol, budget, _COMPILED_PERIOD, _FAST, patience)


@dataclass(frozen=True, kw_only=True)
class _AitkenWhileFast(Aitken):
    """Aitken's iteration that hands a sample over when its measured rate promises too many further steps."""

    overhead: int = 1

    def hand_over(self, residual: np.ndarray, previous: np.ndarray, steps: int, rtol: float) -> np.ndarray | None:
        slow: np.ndarray = residual > _FAST**steps * previous
        if not slow.any():
            return None
        # The rate between the last two looks says how many more steps it takes: rate ** remaining = rtol / residual.
        # A residual that does not fall has a rate of 1 or more and takes for ever: remaining is not positive.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            remaining = steps * np.log(rtol / residual) / np.log(residual / previous)
        return slow & ~((remaining >= 0) & (remaining <= _PATIENCE * self.overhead))


@dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """Chooses per sample: Picard with Aitken steps and a measured rate, and Anderson for samples on which that is slow.

    A sample's rate is taken from its own residuals alone, so what is chosen for it does not depend on its
    batch-mates.  A strictly triangular equilibrium is solved by substitution.

    Arguments:
        slow: the solver that takes over slow samples, at their current iterate; it works to the tolerance given here.
        rtol, atol, max_steps: as for `Solver`; ``max_steps`` counts both methods together.

    Source: docs/theory.md §5.2; rates by the residual ratio.
    """

    slow: Solver = field(default_factory=Anderson)

    def methods(self, f: Map) -> Iterator[Any]:
        if f.triangular:
            yield Substitution()
            return
        if self.max_steps > 1:
            yield CompiledSweeps(self)
        # An Anderson step costs about ten small operations more than a sweep: nothing beside an f that takes
        # milliseconds, four sweeps and more where the map says that looking at a residual is expensive.
        yield _AitkenWhileFast(overhead=f.check_interval)
        # A method that decides for itself when to look at its iterate has to know the tolerance it is solved to.
        yield replace(self.slow, rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)

    def step(self, f: Map, x: Tensor, fx: Tensor, state: Any) -> tuple[Tensor, Any, int]:
        raise AssertionError("Auto only chooses; its methods step")
