"""One method at work: when to look at the residual, which samples go on, which are done, lost, or left to another.

Looks happen at step numbers that depend on the method and the map only, never on the batch, so a sample stops where
it would have stopped alone, up to the rounding of f.  Bookkeeping is done on the host in numpy: on a small model a
handful of torch operations per look would cost more than the sweeps between two looks.
"""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..equations.map import RowMap
from ..solution import Status
from ..solvers.base import Solver
from .correction import Correction
from .indexing import on_device, put, select
from .outcome import Results
from .residual import Residual

# Finished samples leave the batch when half of it has; for a map that calls itself cheap, only when the numbers that
# a sweep would go on computing for nothing outweigh the dozen small operations of taking the others out.
_COMPACT_BELOW = 0.5
_COMPACT_FROM = 1 << 13
# What a sweep leaves of the residual in models that training has made: where looks are rare, the first one comes when
# it says that the tolerance is reached, and after three intervals at most for the sake of the easier ones.
_USUAL_RATE = 0.4
_LATEST_FIRST = 3


class Stage:
    """One method at work on some of the rows."""

    def __init__(
        self, f: RowMap, x: Tensor, best_x: Tensor, rows: np.ndarray, method: Solver, results: Results
    ) -> None:
        batch = x.shape[0]
        self.f, self.x, self.method, self.results = f, x, method, results
        # For the next stage: where to start, the best iterates so far, and which rows are handed to it.
        self.start, self.kept = x, best_x
        self.handed = np.zeros(batch, dtype=bool)
        self.rows = np.arange(batch)  # batch index of each row that is evaluated
        self.live = np.zeros(batch, dtype=bool)  # which of them are still being solved
        self.live[rows] = True
        # Row by row: the best iterate so far, its residual, that of the last look, and evaluations of earlier stages.
        self.best_x, self.best = best_x, results.residual.copy()
        self.previous: np.ndarray | None = None
        self.halfway: np.ndarray | None = None  # the best residual when half of the steps were spent
        self.root = bool(getattr(f, "root", False))
        self.residual = (Correction if self.root else Residual)(results.first_size)
        self.before = results.steps.copy()
        # x and f(x) of the evaluation before.
        self.last: tuple[Tensor, Tensor] | None = None

    def run(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """The batch's iterates where the next stage should start, its best ones, and the rows that it should take."""
        self._drop_finished()
        method, results = self.method, self.results
        interval = method.check_interval(self.f)
        state = method.init(self.f, self.x)
        fx = method.evaluate(self.f, self.x, state)
        if fx.dtype != self.x.dtype:  # autocast decides the dtype of the state
            held = (self.x, self.start, self.kept, self.best_x)
            self.x, self.start, self.kept, self.best_x = (tensor.to(fx.dtype) for tensor in held)
        results.set_tolerance(fx.dtype)
        self._budget = results.solver.max_steps - int(self.before.max())
        spent, sweep = 1, 1
        first = _first_look(interval, results.rtol)
        if first > 1 and results.trace is None and not self.root:
            self.residual.begin(self.f, self.x, fx)
        while True:
            scheduled = sweep >= first and (sweep - first) % interval == 0
            wanted = scheduled or spent >= self._budget or results.trace is not None
            were_live = self.live
            if wanted and self._look(fx, state, spent, interval, scheduled):
                if results.keep_inverse:
                    results.keep(self.rows, were_live & ~self.live, method.inverse(state))
                if not self.live.any():
                    return self.start, self.kept, self.handed.nonzero()[0]
                kept = self._drop_finished()
                if kept is not None:
                    state, fx = method.take(state, kept), fx.index_select(0, kept)
            self.last = self.x, fx
            value = self.x + fx if self.root and not method.by_residual else fx
            self.x, state, extra = method.step(self.f, self.x, value, state)
            fx = method.evaluate(self.f, self.x, state)
            spent += 1 + extra
            sweep += 1

    def _look(self, fx: Tensor, state: Any, spent: int, interval: int, scheduled: bool) -> bool:
        """Read the residuals and decide which samples are done, out of steps, lost, or better served elsewhere.

        Returns whether any sample has left.
        """
        results, rows, were_live = self.results, self.rows, self.live
        residual = self._residual(fx, state)
        vanishing = self.residual.vanishing
        if scheduled and vanishing is not None and vanishing.any():
            self._try_zero(residual, vanishing, spent)
        live, total = self.live, self.before + spent
        if 2 * spent >= self._budget and self.halfway is None:
            self.halfway = self.best
        if scheduled and results.trace is None and live.all():
            if spent < self._budget and self._all_on_their_way(residual, interval):
                return False
            if residual.max() <= results.rtol:
                return self._all_arrived(residual, total)
        if results.trace is not None:
            results.trace[np.minimum(total[live], len(results.trace)) - 1, rows[live]] = residual[live]
        out_of_steps = total >= results.solver.max_steps
        # A look for the sake of one sample's budget, or of the trace, must not decide on the others.
        due = live if scheduled else live & out_of_steps
        better = due & (residual < self.best)
        self._keep_best(better, residual)
        done = due & (residual <= results.rtol)
        lost = due & ~np.isfinite(residual) & ~(self.method.recovers & np.isfinite(self.best))
        ended = done | lost | (due & out_of_steps)
        if scheduled:
            if self.previous is not None:
                slow = self.method.hand_over(residual, self.previous, interval, results.rtol)
                if slow is not None:
                    # At f(x) where x is the best so far, else at the best.
                    slow = slow & due & self.live & ~ended
                    self._hand_over(slow, slow & better, fx)
            self.previous = residual
        if ended.any():
            results.finish(rows, ended, self.best_x, self.best)
            results.status[rows[ended]] = self._why(done, lost)[ended]
            self.live = self.live & ~ended
        results.steps[rows[due]] = total[due]
        return self.live is not were_live

    def _why(self, done: np.ndarray, lost: np.ndarray) -> np.ndarray:
        """The `Status` of rows that end here."""
        away = self.residual.away
        halfway = self.best if self.halfway is None else self.halfway
        no_better = np.where(2 * self.best > halfway, Status.STALLED, Status.OUT_OF_STEPS)
        return np.select(
            [done, away, lost], [Status.CONVERGED, Status.RUNS_AWAY, Status.NOT_FINITE], no_better
        )  # fmt: skip

    def _try_zero(self, residual: np.ndarray, vanishing: np.ndarray, spent: int) -> None:
        """Where parts of a state shrink without end, f itself says whether 0 is the solution that they approach.

        There is nothing that a residual could be relative to.  It costs a row one evaluation each time that a part
        has shrunk by the tolerance.
        """
        results = self.results
        due = self.live & (residual > results.rtol) & (self.before + spent < results.solver.max_steps)
        vanishing = vanishing & due
        which: np.ndarray = np.logical_or.reduce(vanishing)
        if not which.any():
            return
        f = self.f.take(on_device(which.nonzero()[0], self.x))
        x = self.x.detach() if f is None else select(self.x.detach(), which)
        f, kept = (self.f, vanishing) if f is None else (f, vanishing[:, which])
        trial, parts = x.clone(), getattr(f, "parts", None)
        for columns, zeros in zip(parts or (slice(None),), kept, strict=True):
            trial[:, columns] = torch.where(on_device(zeros[:, None], x), 0.0, trial[:, columns])
        with torch.no_grad():
            left = self.residual.fresh()(f, trial, f(trial), None, results.rtol, results.solver.atol)
        if len(left) < len(which):
            whole = np.full(len(which), np.inf)
            whole[which], left = left, whole
            trial = put(self.x, which, trial)
        self.before = self.before + which
        found = which & (left <= results.rtol)
        for part, zeros in enumerate(vanishing):
            self.residual.tried_zero(part, zeros)
        if found.any():
            results.finish(self.rows, found, trial, left)
            results.status[self.rows[found]] = Status.CONVERGED
            results.steps[self.rows[found]] = (self.before + spent)[found]
            self.live = self.live & ~found

    def _all_on_their_way(self, residual: np.ndarray, interval: int) -> bool:
        """The commonest look, at a fraction of the price: nobody ends, everybody improves, nobody is slow."""
        # An infinite residual fails the second comparison.
        if not residual.min() > self.results.rtol or not (residual < self.best).all():
            return False
        if self.previous is not None:
            slow = self.method.hand_over(residual, self.previous, interval, self.results.rtol)
            if slow is not None and slow.any():
                return False
        self.best_x, self.best, self.previous = self.x, residual, residual
        return True

    def _all_arrived(self, residual: np.ndarray, total: np.ndarray) -> bool:
        """The commonest last look: everybody is done, and nobody's best iterate is an earlier one, which was not."""
        results, rows = self.results, self.rows
        results.finish(rows, self.live, self.x, residual)
        results.status[rows] = Status.CONVERGED
        results.steps[rows] = total
        self.live = np.zeros_like(self.live)
        return True

    def _residual(self, fx: Tensor, state: Any) -> np.ndarray:
        f, x, results = self.f, self.x, self.results
        if isinstance(self.residual, Correction):
            p = self.method.correction(f, x, fx, state)
            with torch.no_grad():
                residual = self.residual(
                    f, x, fx, None, results.rtol, results.solver.atol, before=self.last, correction=p
                )
            results.first_size = self.residual.first_size
            return residual
        # Of a state that is not what is returned, and of its parts, the method knows nothing that counts.
        plain = not hasattr(f, "observed") and getattr(f, "parts", None) is None and not torch.is_grad_enabled()
        norms = self.method.norms(x, fx, state) if plain else None
        residual = self.residual(
            f, x, fx, norms, results.rtol, results.solver.atol,
            before=self.last, exact=self.method.exact, probe=self.method.by_residual,
        )  # fmt: skip
        if self.residual.probed is not None:
            self.before = self.before + self.residual.probed
        if results.first_size is None:
            results.first_size = self.residual.first_size
        return residual

    def _keep_best(self, better: np.ndarray, residual: np.ndarray) -> None:
        # The usual case by reference, since iterates are never changed in place; what has finished is stored.
        if (better | ~self.live).all():
            self.best_x, self.best = self.x, residual
        elif better.any():
            self.best_x = put(self.best_x, better, select(self.x, better))
            self.best = np.where(better, residual, self.best)

    def _hand_over(self, which: np.ndarray, ahead: np.ndarray, fx: Tensor) -> None:
        """Leave samples to the next stage, at f(x) or else at the best so far."""
        if which.any():
            rows, best_x = self.rows[which], select(self.best_x, which)
            self.kept = put(self.kept, rows, best_x)
            self.start = put(put(self.start, rows, best_x), self.rows[ahead], select(fx, ahead))
            self.results.residual[rows] = self.best[which]
            self.handed[rows] = True
            self.live = self.live & ~which

    def _drop_finished(self) -> Tensor | None:
        """Shrink the batch to the live rows when it pays; returns their indices if it was done."""
        live = self.live
        remaining = np.count_nonzero(live)
        if remaining > _COMPACT_BELOW * len(live):
            return None
        if self.f.check_interval > 1 and (len(live) - remaining) * self.x.shape[1] < _COMPACT_FROM:
            return None
        kept = on_device(live.nonzero()[0], self.x)
        f = self.f.take(kept)
        if f is None:
            return None
        self.f, self.x, self.best_x = f, self.x.index_select(0, kept), self.best_x.index_select(0, kept)
        self.rows, self.best, self.before = self.rows[live], self.best[live], self.before[live]
        self.previous, self.halfway = (None if held is None else held[live] for held in (self.previous, self.halfway))
        if self.last is not None:
            self.last = self.last[0].index_select(0, kept), self.last[1].index_select(0, kept)
        self.residual.take(live)
        self.live = live[live]
        return kept


def _first_look(interval: int, rtol: float) -> int:
    """The evaluation that is looked at first; right behind an extrapolation, like all that follow."""
    if interval == 1:
        return 1
    intervals = round((log(rtol) / log(_USUAL_RATE) - 1) / interval) if rtol < 1 else 1
    return 1 + interval * min(max(intervals, 1), _LATEST_FIRST)
