"""The one loop: when to look at the residual, which samples go on, what is returned.

Looks happen at step numbers that depend on the solver and the map only, never on the batch, so a sample stops
where it would have stopped alone.  Bookkeeping is done on the host in numpy: on a small model a handful of torch
operations per look would cost more than the sweeps between two looks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .equilibrium import RowMap
from .indexing import on_device, put, select
from .kernels import sweeps as kernel
from .kernels.sweeps import Swept
from .residual import Residual
from .solvers.base import Solver
from .solvers.inverse import InverseEstimate
from .units import InUnits, in_units

# Finished samples leave the batch when half of it has; for a map that calls itself cheap, only when the numbers that
# a sweep would go on computing for nothing outweigh the dozen small operations of taking the others out.
_COMPACT_BELOW = 0.5
_COMPACT_FROM = 1 << 13
# What a sweep leaves of the residual in models that training has made: where looks are rare, the first one comes when
# it says that the tolerance is reached, and after three intervals at most for the sake of the easier ones.
_USUAL_RATE = 0.4
_LATEST_FIRST = 3
# Iterates up to this many numbers are kept whole for the sake of the samples that ended with them: a reference is free.
_HOLD_UP_TO = 1 << 18


@dataclass(slots=True)
class Outcome:
    """What the loop found: the best iterate of every sample and its figures, as `Solution` describes them.

    Attributes:
        slope: φ' at x, of an `Equilibrium` that the compiled loop has solved; None otherwise.
        inverse: (I − J)⁻¹ as the solver knew it when each sample finished; None where the solver estimates none, or
            it was not asked for.
    """

    x: Tensor
    residual: Tensor
    steps: Tensor
    converged: Tensor
    all_converged: bool
    trace: Tensor | None
    rtol: float
    inverse: InverseEstimate | None = None
    slope: Tensor | None = None

    @classmethod
    def of(cls, swept: Swept, solver: Solver) -> Outcome:
        """That of a compiled loop which has solved every row."""
        x, slope, residual, steps, done, *_ = swept
        return cls(x, residual, steps, done, True, None, solver.tolerance(x.dtype), None, slope)

    def of_each(self, samples: int) -> Outcome:
        """The figures of the one row that holds a coupled batch, as those of every sample in it."""
        figures = {name: getattr(self, name).expand(samples) for name in ("residual", "steps", "converged")}
        trace = None if self.trace is None else self.trace.expand(-1, samples)
        return replace(self, **figures, trace=trace)


def iterate(
    f: RowMap, x: Tensor | None, solver: Solver, *, trace: bool = False, keep_inverse: bool = False,
    swept: Swept | None = None,
) -> Outcome:  # fmt: skip
    """Solve x = f(x) for every row of x, each to the solver's tolerance or to its best iterate.

    Without an x the start is f(0), of an `Equilibrium` or its adjoint.  ``swept`` is the first stage, if it has been.

    Methods multiply differences with each other.  Samples for which the dtype does not hold such products leave for
    another round, in units of their own size; every round costs an evaluation, so the budget ends them.
    """
    if swept is None and not (trace or keep_inverse or torch.is_grad_enabled()):
        swept = solver.first_stage(f, x)
    if swept is not None and not swept.unsolved:
        return Outcome.of(swept, solver)
    if x is None:
        x = f.after_zero()  # type: ignore[attr-defined]
    results = _Results(f, x, solver, trace, keep_inverse)
    rows, stages = np.arange(x.shape[0]), solver.stages(f)
    if swept is not None:
        next(stages)
        x, rows = results.take_over(x, swept)
    best_x = x
    with np.errstate(all="ignore"):  # a diverging sample is reported by its residual
        while True:
            for method in stages:
                x, best_x, rows = _Stage(f, x, best_x, rows, method, results).run()
                if not rows.size:
                    break
            rows = results.take_outside()
            if not rows.size:
                return results.outcome()
            f, x, best_x = in_units(f, x, best_x, rows)
            # Where it still matters in these units the sample is within it; the loop goes on testing it.
            solver = replace(solver, atol=0.0) if solver.atol else solver
            stages = solver.stages(f)


class _Results:
    """The figures of the whole batch, kept on the host, and what every finished sample ended with."""

    def __init__(self, f: RowMap, x: Tensor, solver: Solver, trace: bool, keep_inverse: bool) -> None:
        batch = x.shape[0]
        self.solver = solver
        # That of f where it is less than that of its values: under autocast.
        self.precision: torch.dtype | None = getattr(f, "precision", None)
        self.set_tolerance(x.dtype)
        self.residual = np.full(batch, np.inf)
        self.steps = np.zeros(batch, dtype=np.int64)
        self.converged = np.zeros(batch, dtype=bool)
        self.outside = np.zeros(batch, dtype=bool)  # whose products the dtype does not hold
        self.first_size: np.ndarray | None = None
        self.trace = np.full((solver.max_steps, batch), np.nan) if trace else None
        # Groups of finished rows: their numbers in the batch, in the tensor that holds their values, and the tensor.
        self._finished: list[tuple[np.ndarray, np.ndarray | None, Tensor]] = []
        self.keep_inverse = keep_inverse
        self._inverses: list[tuple[Tensor, InverseEstimate]] = []

    def set_tolerance(self, dtype: torch.dtype) -> None:
        """That of values of this dtype, or the coarser one of the precision that they are computed in."""
        own = self.solver.tolerance(dtype)
        self.rtol = own if self.precision is None else max(own, self.solver.tolerance(self.precision))

    def take_outside(self) -> np.ndarray:
        rows = self.outside.nonzero()[0]
        self.outside[:] = False
        return rows

    def finish(self, rows: np.ndarray, which: np.ndarray, x: Tensor, residual: np.ndarray) -> None:
        """Store the value and the residual of those of ``rows`` that ``which`` marks."""
        if which.all():
            self._finished.append((rows, None, x))
            self.residual[rows] = residual
            return
        ended = which.nonzero()[0]
        self.residual[rows[ended]] = residual[ended]
        if x.numel() > _HOLD_UP_TO:
            self._finished.append((rows[ended], None, x.index_select(0, on_device(ended, x))))
        else:
            self._finished.append((rows[ended], ended, x))

    def take_over(self, x: Tensor, swept: Swept) -> tuple[Tensor, np.ndarray]:
        """Keep what a compiled loop has solved; the other rows, and where the next stage is to start."""
        status, rows = swept.status(), np.arange(len(self.residual))
        done = status == kernel.DONE
        self.steps = swept.steps.numpy()
        self.converged = done
        if done.any():
            self.finish(rows, done, swept.x, swept.residual.numpy())
        return torch.where(on_device((status == kernel.SLOW)[:, None], x), swept.x, x), rows[~done]

    def keep(self, rows: np.ndarray, which: np.ndarray, inverse: InverseEstimate | None) -> None:
        """Store the inverse estimate of those of ``rows`` that ``which`` marks."""
        if inverse is not None:
            self._inverses.append(
                (on_device(rows[which], inverse.left), inverse.take(on_device(which.nonzero()[0], inverse.left)))
            )

    def outcome(self) -> Outcome:
        x = self._values()
        figures = np.float64 if x.dtype == torch.float64 else np.float32
        trace = self.trace
        if trace is not None:
            trace = trace[: max(int(self.steps.max()), 1)]
        return Outcome(
            x=x,
            residual=on_device(self.residual.astype(figures), x),
            steps=on_device(self.steps, x),
            converged=on_device(self.converged, x),
            all_converged=bool(self.converged.all()),
            trace=None if trace is None else on_device(trace.astype(figures), x),
            rtol=self.rtol,
            inverse=InverseEstimate.merged(len(self.residual), self._inverses) if self._inverses else None,
        )

    def _values(self) -> Tensor:
        *earlier, (rows, inside, x) = self._finished
        batch = len(self.residual)
        if len(x) == batch and all(len(held) == batch for _, _, held in earlier):
            # Nobody was taken out of the batch: every row stands at its own place in every tensor.
            for rows, _, held in earlier:
                mask = np.zeros((batch, 1), dtype=bool)
                mask[rows] = True
                x = torch.where(on_device(mask, x), held, x)
            return x
        place = np.empty(batch, dtype=np.int64)
        offset = 0
        for rows, inside, x in self._finished:
            place[rows] = (np.arange(len(rows)) if inside is None else inside) + offset
            offset += len(x)
        return torch.cat([x for _, _, x in self._finished]).index_select(0, on_device(place, x))


class _Stage:
    """One method at work on some of the rows."""

    def __init__(
        self, f: RowMap, x: Tensor, best_x: Tensor, rows: np.ndarray, method: Solver, results: _Results
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
        self.residual = Residual(f, results.first_size)
        self.before = results.steps.copy()

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
            self.x, state, extra = method.step(self.f, self.x, fx, state)
            fx = method.evaluate(self.f, self.x, state)
            spent += 1 + extra
            sweep += 1

    def _look(self, fx: Tensor, state: Any, spent: int, interval: int, scheduled: bool) -> bool:
        """Read the residuals and decide which samples are done, out of steps, lost, or better served elsewhere.

        Returns whether any sample has left.
        """
        results, rows, live = self.results, self.rows, self.live
        residual = self._residual(fx, state)
        total = self.before + spent
        if scheduled and self.residual.outside is None and results.trace is None and live.all():
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
        ended = done | (due & (out_of_steps | ~np.isfinite(residual)))
        if self.residual.outside is not None:
            outside = self.residual.outside & due & ~ended
            self._hand_over(outside, outside, fx, results.outside)
        if scheduled:
            if self.previous is not None:
                slow = self.method.hand_over(residual, self.previous, interval, results.rtol)
                if slow is not None:
                    # At f(x) where x is the best so far, else at the best.
                    slow = slow & due & self.live & ~ended
                    self._hand_over(slow, slow & better, fx, self.handed)
            self.previous = residual
        if ended.any():
            results.finish(rows, ended, self._in_full(self.best_x), self.best)
            results.converged[rows] |= done
            self.live = self.live & ~ended
        results.steps[rows[due]] = total[due]
        return self.live is not live

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
        results.finish(rows, self.live, self._in_full(self.x), residual)
        results.converged[rows] = True
        results.steps[rows] = total
        self.live = np.zeros_like(self.live)
        return True

    def _residual(self, fx: Tensor, state: Any) -> np.ndarray:
        f, x, results = self.f, self.x, self.results
        # Of a state that is not what is returned the method knows nothing that counts.
        plain = not hasattr(f, "observed") and not torch.is_grad_enabled()
        norms = self.method.norms(x, fx, state) if plain else None
        residual = self.residual(f, x, fx, norms, results.rtol, results.solver.atol)
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

    def _in_full(self, x: Tensor) -> Tensor:
        return self.f.leave(x) if isinstance(self.f, InUnits) else x

    def _hand_over(self, which: np.ndarray, ahead: np.ndarray, fx: Tensor, to: np.ndarray) -> None:
        """Leave samples to a later stage, marked there, at f(x) or else at the best so far."""
        if which.any():
            rows, best_x = self.rows[which], select(self.best_x, which)
            self.kept = put(self.kept, rows, best_x)
            self.start = put(put(self.start, rows, best_x), self.rows[ahead], select(fx, ahead))
            self.results.residual[rows] = self.best[which]
            to[rows] = True
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
        self.previous = None if self.previous is None else self.previous[live]
        self.residual.take(live)
        self.live = live[live]
        return kept


def _first_look(interval: int, rtol: float) -> int:
    """The evaluation that is looked at first; right behind an extrapolation, like all that follow."""
    if interval == 1:
        return 1
    intervals = round((log(rtol) / log(_USUAL_RATE) - 1) / interval) if rtol < 1 else 1
    return 1 + interval * min(max(intervals, 1), _LATEST_FIRST)
