"""Sparser and sparser models: SIM for a series of penalties, each started from the one before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .._internal.errors import wrong
from ..nn import ImplicitModel
from .matching import SIMReport, StateMatching
from .problem import RowProblem
from .solvers import BaseSolver, PenalisedSolver
from .solvers.base_solver import Progress, SIMSolution

T = TypeVar("T")

# A count of nonzeros within this share below the one asked for ends the search, and so do this many solves.
_CLOSE, _TRIES = 0.02, 20


@dataclass(frozen=True)
class PathPoint:
    """One model of a path.

    Attributes:
        lambda_z: λ of the rows of (A, B).
        lambda_y: λ of the rows of (C, D).
        model: the `ImplicitModel`.
        report: the `SIMReport` of the rows at these λ; norm and nonzeros are the model's.
    """

    lambda_z: float
    lambda_y: float
    model: ImplicitModel
    report: SIMReport


def by_penalty(
    matching: StateMatching, solver: BaseSolver, lambdas: Sequence[float], refit: bool, on_progress: Progress | None
) -> list[PathPoint]:
    """A point for each λ_z, in the order given; solved from the largest, which is the sparsest, down."""
    walk = _Walk(matching, solver, refit)
    points = {value: walk.at(value) for value in _counted(sorted(set(lambdas), reverse=True), on_progress)}
    return [points[value] for value in lambdas]


def by_count(
    matching: StateMatching, solver: BaseSolver, nonzeros: Sequence[int], refit: bool, on_progress: Progress | None
) -> list[PathPoint]:
    """For each count the densest model found that has at most so many nonzeros, by bisection in log λ."""
    walk = _Walk(matching, solver, refit)
    points = {value: walk.below(value) for value in _counted(sorted(set(nonzeros)), on_progress)}
    return [points[value] for value in nonzeros]


def _counted(values: list[T], on_progress: Progress | None) -> Iterator[T]:
    for done, value in enumerate(values):
        yield value
        if on_progress is not None:
            on_progress(done + 1, len(values))


class _Walk:
    """Solves at one λ after another; remembers where it has been."""

    def __init__(self, matching: StateMatching, solver: BaseSolver, refit: bool) -> None:
        if not isinstance(solver, PenalisedSolver):
            raise wrong("SIM.path", "a solver with lambda_z and lambda_y", type(solver).__name__, "Use ADMMSolver().")
        self._matching, self._solver, self._refit = matching, solver, refit
        self._ratio = solver.lambda_y / solver.lambda_z if solver.lambda_z > 0 else 1.0
        self._last: SIMSolution | None = None
        self._points: list[PathPoint] = []

    def at(self, value: float) -> PathPoint:
        solver = replace(self._solver, lambda_z=value, lambda_y=value * self._ratio)
        self._last = self._matching.fit(solver, self._last)
        found = self._matching.refitted(self._last) if self._refit else self._last
        point = PathPoint(value, value * self._ratio, *self._matching.model(found))
        self._points.append(point)
        return point

    def below(self, nonzeros: int) -> PathPoint:
        if not self._points:
            states = self._matching.states
            rows = RowProblem(X=states["X"], U=states["U"], T=states["Z"], lam=0.0)
            self.at(float(rows.lambda_max().max()))
        for _ in range(_TRIES):
            fits = [point for point in self._points if point.report.nonzeros <= nonzeros]
            best = max(fits, key=lambda point: point.report.nonzeros, default=None)
            if best is not None and best.report.nonzeros >= (1 - _CLOSE) * nonzeros:
                break
            above = [point.lambda_z for point in self._points if point.report.nonzeros > nonzeros]
            self.at(_between(max(above, default=None), min((p.lambda_z for p in fits), default=None)))
        assert best is not None
        return best


def _between(low: float | None, high: float | None) -> float:
    """The middle of two λ on a logarithmic scale, or a step beyond the one that is known."""
    if low is None or high is None:
        known = low if high is None else high
        assert known is not None
        return known * (10.0 if high is None else 0.1)
    return math.sqrt(low * high)
