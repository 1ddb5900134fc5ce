"""The one loop: when to look at the residual, which samples go on, what is returned.

Looks happen at step numbers that depend on the solver and the map only, never on the batch, so a sample stops
where it would have stopped alone.  Bookkeeping is done on the host in numpy: on a small model a handful of torch
operations per look would cost more than the sweeps between two looks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .equilibrium import RowMap
from .solvers.base import Solver

# Finished samples leave the batch once they are a quarter of it: indexing the rest costs a copy of the state.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class Outcome:
    """What the loop found: the best iterate of every sample and its figures, as `Solution` describes them."""

    x: Tensor
    residual: Tensor
    steps: Tensor
    converged: Tensor
    all_converged: bool
    trace: Tensor | None
    rtol: float


def iterate(f: RowMap, x: Tensor, solver: Solver, *, trace: bool = False) -> Outcome:
    """Solve x = f(x) for every row of x, each to the solver's tolerance or to its best iterate."""
    results = _Results(x, solver, trace)
    rows = np.arange(x.shape[0])
    for method in solver.stages(f):
        stage = _Stage(f, x, rows, method, results)
        x, rows = stage.run()
        if not rows.size:
            break
    return results.outcome()


class _Results:
    """The figures of the whole batch, kept on the host, and the best iterate of every sample."""

    def __init__(self, x: Tensor, solver: Solver, trace: bool) -> None:
        batch = x.shape[0]
        self.solver = solver
        self.rtol = solver.tolerance(x.dtype)
        self.best_x = x
        self.residual = np.full(batch, np.inf)
        self.steps = np.zeros(batch, dtype=np.int64)
        self.converged = np.zeros(batch, dtype=bool)
        self.trace = np.full((solver.max_steps, batch), np.nan) if trace else None

    def cast(self, dtype: torch.dtype) -> None:
        """Take the dtype that f returns: under autocast it is not that of x0."""
        self.best_x, self.rtol = self.best_x.to(dtype), self.solver.tolerance(dtype)

    def keep(self, rows: np.ndarray, better: np.ndarray, x: Tensor, residual: np.ndarray) -> None:
        if better.all() and len(rows) == len(self.residual):
            self.best_x = x
        elif better.any():
            self.best_x = _put(self.best_x, rows[better], x[_index(better, x)])
        self.residual[rows[better]] = residual[better]

    def outcome(self) -> Outcome:
        x, device = self.best_x, self.best_x.device
        figures = torch.float64 if x.dtype == torch.float64 else torch.float32
        trace = self.trace
        if trace is not None:
            trace = trace[: max(int(self.steps.max()), 1)]
        return Outcome(
            x=x,
            residual=torch.from_numpy(self.residual).to(device, figures),
            steps=torch.from_numpy(self.steps).to(device),
            converged=torch.from_numpy(self.converged).to(device),
            all_converged=bool(self.converged.all()),
            trace=None if trace is None else torch.from_numpy(trace).to(device, figures),
            rtol=self.rtol,
        )


class _Stage:
    """One method at work on some of the rows."""

    def __init__(self, f: RowMap, x: Tensor, rows: np.ndarray, method: Solver, results: _Results) -> None:
        self.f, self.x, self.method, self.results = f, x, method, results
        self.start = x
        self.rows = np.arange(x.shape[0])  # batch index of each row that is evaluated
        self.live = np.zeros(x.shape[0], dtype=bool)  # which of them are still being solved
        self.live[rows] = True
        self.spent_before = results.steps.copy()
        self.handed = np.zeros(x.shape[0], dtype=bool)
        self.previous: np.ndarray | None = None

    def run(self) -> tuple[Tensor, np.ndarray]:
        """The batch's iterates where the next stage should start, and the rows that it should take."""
        self._drop_finished()
        f, method, results = self.f, self.method, self.results
        interval = method.check_interval(f)
        state = method.init(f, self.x)
        fx = f(self.x)
        if fx.dtype != self.x.dtype:
            results.cast(fx.dtype)
            self.x, self.start = self.x.to(fx.dtype), self.start.to(fx.dtype)
        spent, sweep = 1, 1
        while True:
            scheduled = sweep % interval == 0
            if scheduled or spent >= self._budget or results.trace is not None:
                self._look(fx, spent, interval, scheduled)
                if not self.live.any():
                    return self.start, np.flatnonzero(self.handed)
                kept = self._drop_finished()
                if kept is not None:
                    state, fx = method.take(state, kept), fx[kept]
            self.x, state, extra = method.step(self.f, self.x, fx, state)
            fx = self.f(self.x)
            spent += 1 + extra
            sweep += 1

    def _look(self, fx: Tensor, spent: int, interval: int, scheduled: bool) -> None:
        """Read the residuals and decide which samples are done, out of steps, lost, or better served elsewhere."""
        results, rows, live = self.results, self.rows, self.live
        observed = getattr(self.f, "observed", _itself)
        floor = results.solver.atol / results.rtol
        residual = _relative_residual(observed(self.x), observed(fx), floor)
        total = self.spent_before[rows] + spent
        if results.trace is not None:
            results.trace[np.minimum(total[live], len(results.trace)) - 1, rows[live]] = residual[live]
        out_of_steps = total >= results.solver.max_steps
        due = live if scheduled else live & out_of_steps
        done = due & (residual <= results.rtol)
        better = due & (residual < results.residual[rows])
        results.keep(rows, better, self.x, residual)
        results.steps[rows[due]] = total[due]
        results.converged[rows[done]] = True
        ended = due & (done | out_of_steps | ~np.isfinite(residual))
        if scheduled:
            if self.previous is not None:
                slow = self.method.hand_over(residual, self.previous, interval, results.rtol)
                if slow is not None:
                    ended |= self._hand_over(slow & due & ~ended, better, fx)
            self.previous = residual
        self.live = live & ~ended

    def _hand_over(self, slow: np.ndarray, better: np.ndarray, fx: Tensor) -> np.ndarray:
        """Leave slow samples to the next stage: at f(x) where x is the best so far, else at the best."""
        if slow.any():
            self.start = _put(self.start, self.rows[slow], self.results.best_x[_index(self.rows[slow], fx)])
            ahead = slow & better
            self.start = _put(self.start, self.rows[ahead], fx[_index(ahead, fx)])
            self.handed[self.rows[slow]] = True
        return slow

    def _drop_finished(self) -> Tensor | None:
        """Shrink the batch to the live rows when it pays; returns their indices if it was done."""
        if self.live.mean() < _COMPACT_BELOW:
            kept = _index(self.live, self.x)
            f = self.f.take(kept)
            if f is not None:
                self.f, self.x = f, self.x[kept]
                self.rows = self.rows[self.live]
                if self.previous is not None:
                    self.previous = self.previous[self.live]
                self.live = self.live[self.live]
                self._set_budget()
                return kept
        self._set_budget()
        return None

    def _set_budget(self) -> None:
        self._budget = self.results.solver.max_steps - int(self.spent_before[self.rows[self.live]].max())


def _relative_residual(x: Tensor, fx: Tensor, floor: float) -> np.ndarray:
    """‖f(x) − x‖₂ / (floor + ‖f(x)‖₂) per row, at least in float32; 0 where both norms are 0."""
    if fx.dtype in (torch.bfloat16, torch.float16):
        x, fx = x.float(), fx.float()
    x, fx = x.detach(), fx.detach()
    size = torch.linalg.vector_norm(fx, dim=1).add_(floor).clamp_(min=torch.finfo(fx.dtype).tiny)
    residual: np.ndarray = torch.linalg.vector_norm(fx - x, dim=1).div_(size).double().cpu().numpy()
    return residual


def _itself(x: Tensor) -> Tensor:
    return x


def _index(rows: np.ndarray, like: Tensor) -> Tensor:
    """A mask or an array of row numbers as an index tensor on the device of ``like``."""
    return torch.from_numpy(np.flatnonzero(rows) if rows.dtype == bool else rows).to(like.device)


def _put(base: Tensor, rows: np.ndarray, values: Tensor) -> Tensor:
    """``base`` with some rows replaced; a new tensor, since iterates and graphs may share the old one."""
    return base.index_put((_index(rows, base),), values)
