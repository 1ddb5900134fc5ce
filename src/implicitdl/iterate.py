"""The one loop: when to look at the residual, which samples go on, what is returned.

Looks happen at step numbers that depend on the solver and the map only, never on the batch, so a sample stops
where it would have stopped alone.  Bookkeeping is done on the host in numpy: on a small model a handful of torch
operations per look would cost more than the sweeps between two looks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log

import numpy as np
import torch
from torch import Tensor

from .equilibrium import RowMap
from .kernels import sweeps as kernel
from .kernels.sweeps import Swept
from .solvers.base import Solver
from .solvers.inverse import InverseEstimate

# Finished samples leave the batch when half of it has; for a map that calls itself cheap, only when the numbers that
# a sweep would go on computing for nothing outweigh the dozen small operations of taking the others out.
_COMPACT_BELOW = 0.5
_COMPACT_FROM = 1 << 13
# What a sweep leaves of the residual in models that training has made: where looks are rare, the first one comes when
# it says that the tolerance is reached, and after three intervals at most for the sake of the easier ones.
_USUAL_RATE = 0.4
_LATEST_FIRST = 3
# Norms from here on have squares that are neither zero nor without digits.
_SMALLEST = {
    np.dtype(kind): float(np.sqrt(np.finfo(kind).tiny)) / np.finfo(kind).eps for kind in (np.float32, np.float64)
}
# Iterates up to this many numbers are kept whole for the sake of the samples that ended with them: a reference is free.
_HOLD_UP_TO = 1 << 18


@dataclass(frozen=True)
class Outcome:
    """What the loop found: the best iterate of every sample and its figures, as `Solution` describes them.

    Attributes:
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

    @classmethod
    def of(cls, swept: Swept, rtol: float) -> Outcome:
        """That of a compiled loop which has solved every row."""
        return cls(swept.x, swept.residual, swept.steps, swept.status.view(torch.bool), True, None, rtol)

    def of_each(self, samples: int) -> Outcome:
        """The figures of the one row that holds a coupled batch, as those of every sample in it."""
        figures = {name: getattr(self, name).expand(samples) for name in ("residual", "steps", "converged")}
        trace = None if self.trace is None else self.trace.expand(-1, samples)
        return replace(self, **figures, trace=trace)


def iterate(f: RowMap, x: Tensor, solver: Solver, *, trace: bool = False, keep_inverse: bool = False) -> Outcome:
    """Solve x = f(x) for every row of x, each to the solver's tolerance or to its best iterate."""
    rows = np.arange(x.shape[0])
    results: _Results | None = None
    with np.errstate(all="ignore"):  # a diverging sample is reported by its residual
        for method in solver.stages(f):
            swept = None if trace or keep_inverse else method.run(f, x)
            if swept is not None and not swept.unsolved:
                return Outcome.of(swept, method.tolerance(x.dtype))
            results = results or _Results(f, x, solver, trace, keep_inverse)
            if swept is None:
                x, rows = _Stage(f, x, rows, method, results).run()
            else:
                x, rows = results.take_over(x, swept)
            if not rows.size:
                break
    assert results is not None, "a solver has a stage"
    return results.outcome()


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

    def finish(self, rows: np.ndarray, which: np.ndarray, x: Tensor, residual: np.ndarray) -> None:
        """Store the value and the residual of those of ``rows`` that ``which`` marks."""
        if which.all():
            self._finished.append((rows, None, x))
            self.residual[rows] = residual
            return
        ended = which.nonzero()[0]
        self.residual[rows[ended]] = residual[ended]
        if x.numel() > _HOLD_UP_TO:
            self._finished.append((rows[ended], None, x.index_select(0, _tensor(ended, x))))
        else:
            self._finished.append((rows[ended], ended, x))

    def take_over(self, x: Tensor, swept: Swept) -> tuple[Tensor, np.ndarray]:
        """Keep what a compiled loop has solved; the other rows, and where the next stage is to start."""
        status, rows = swept.status.numpy(), np.arange(len(self.residual))
        done = status == kernel.DONE
        self.steps = swept.steps.numpy()
        self.converged = done
        if done.any():
            self.finish(rows, done, swept.x, swept.residual.numpy())
        return torch.where(_tensor((status == kernel.SLOW)[:, None], x), swept.x, x), rows[~done]

    def keep(self, rows: np.ndarray, which: np.ndarray, inverse: InverseEstimate | None) -> None:
        """Store the inverse estimate of those of ``rows`` that ``which`` marks."""
        if inverse is not None:
            self._inverses.append(
                (_tensor(rows[which], inverse.left), inverse.take(_tensor(which.nonzero()[0], inverse.left)))
            )

    def outcome(self) -> Outcome:
        x = self._values()
        figures = np.float64 if x.dtype == torch.float64 else np.float32
        trace = self.trace
        if trace is not None:
            trace = trace[: max(int(self.steps.max()), 1)]
        return Outcome(
            x=x,
            residual=_tensor(self.residual.astype(figures), x),
            steps=_tensor(self.steps, x),
            converged=_tensor(self.converged, x),
            all_converged=bool(self.converged.all()),
            trace=None if trace is None else _tensor(trace.astype(figures), x),
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
                x = torch.where(_tensor(mask, x), held, x)
            return x
        place = np.empty(batch, dtype=np.int64)
        offset = 0
        for rows, inside, x in self._finished:
            place[rows] = (np.arange(len(rows)) if inside is None else inside) + offset
            offset += len(x)
        return torch.cat([x for _, _, x in self._finished]).index_select(0, _tensor(place, x))


class _Stage:
    """One method at work on some of the rows."""

    def __init__(self, f: RowMap, x: Tensor, rows: np.ndarray, method: Solver, results: _Results) -> None:
        batch = x.shape[0]
        self.f, self.x, self.method, self.results = f, x, method, results
        self.start = x
        self.handed = np.zeros(batch, dtype=bool)
        self.rows = np.arange(batch)  # batch index of each row that is evaluated
        self.live = np.zeros(batch, dtype=bool)  # which of them are still being solved
        self.live[rows] = True
        # Row by row: the best iterate so far, its residual, that of the last look, and evaluations of earlier stages.
        self.best_x, self.best = x, results.residual.copy()
        self.previous: np.ndarray | None = None
        # ‖f(x)‖ at the very first look, and the largest ‖f(x) − x‖ at any look of this stage.
        self.first_size = results.first_size
        self.largest: np.ndarray | None = None
        self.before = results.steps.copy()
        self._difference: Tensor | None = None

    def run(self) -> tuple[Tensor, np.ndarray]:
        """The batch's iterates where the next stage should start, and the rows that it should take."""
        self._drop_finished()
        method, results = self.method, self.results
        interval = method.check_interval(self.f)
        state = method.init(self.f, self.x)
        fx = method.evaluate(self.f, self.x, state)
        if fx.dtype != self.x.dtype:  # autocast decides the dtype of the state
            self.x, self.start, self.best_x = (t.to(fx.dtype) for t in (self.x, self.start, self.best_x))
        results.set_tolerance(fx.dtype)
        self._budget = results.solver.max_steps - int(self.before.max())
        spent, sweep = 1, 1
        first = _first_look(interval, results.rtol)
        while True:
            scheduled = sweep >= first and (sweep - first) % interval == 0
            wanted = scheduled or spent >= self._budget or results.trace is not None
            were_live = self.live
            if wanted and self._look(fx, spent, interval, scheduled):
                if results.keep_inverse:
                    results.keep(self.rows, were_live & ~self.live, method.inverse(state))
                if not self.live.any():
                    return self.start, self.handed.nonzero()[0]
                kept = self._drop_finished()
                if kept is not None:
                    state, fx = method.take(state, kept), fx.index_select(0, kept)
            self.x, state, extra = method.step(self.f, self.x, fx, state)
            fx = method.evaluate(self.f, self.x, state)
            spent += 1 + extra
            sweep += 1

    def _look(self, fx: Tensor, spent: int, interval: int, scheduled: bool) -> bool:
        """Read the residuals and decide which samples are done, out of steps, lost, or better served elsewhere.

        Returns whether any sample has left.
        """
        results, rows, live = self.results, self.rows, self.live
        residual = self._residual(fx)
        total = self.before + spent
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
        ended = done | (due & (out_of_steps | ~np.isfinite(residual)))
        if scheduled:
            if self.previous is not None:
                slow = self.method.hand_over(residual, self.previous, interval, results.rtol)
                if slow is not None:
                    self._hand_over(slow & due & ~ended, better, fx)
            self.previous = residual
        if ended.any():
            results.finish(rows, ended, self.best_x, self.best)
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
        results.finish(rows, self.live, self.x, residual)
        results.converged[rows] = True
        results.steps[rows] = total
        self.live = np.zeros_like(self.live)
        return True

    def _residual(self, fx: Tensor) -> np.ndarray:
        """‖f(x) − x‖₂ / (atol/rtol + ‖f(x)‖₂) per row, at least in float32; inf where f(x) is not finite.

        A row that has grown until its tolerance exceeds every step it took, while its steps do not become shorter as
        far as rounding tells, shows nothing by being within it, as x + 1 does for large x.  Its residual is 1.  One
        that vanishes beside its first ‖f(x)‖ goes to 0, where there is nothing to be relative to.  Its residual is
        relative to that first size.
        """
        x, dtype, observed = self.x, fx.dtype, getattr(self.f, "observed", None)
        if fx.requires_grad:
            x, fx = x.detach(), fx.detach()
        if observed is not None:
            x, fx = observed(x), observed(fx)
        if fx.dtype in (torch.bfloat16, torch.float16):
            x, fx = x.float(), fx.float()
        size: np.ndarray = torch.linalg.vector_norm(fx, dim=1).cpu().numpy()
        # On a large state a fresh tensor costs several times the subtraction that fills it.
        if self._difference is None or self._difference.shape != fx.shape:
            self._difference = torch.empty_like(fx)
        torch.sub(fx, x, out=self._difference)
        change: np.ndarray = torch.linalg.vector_norm(self._difference, dim=1).cpu().numpy()
        results = self.results
        floor = results.solver.atol / results.rtol
        residual: np.ndarray = change / (size + floor if floor else size)
        extreme: np.ndarray | None = None
        if not (size.min() > _SMALLEST[size.dtype] and size.max() < np.inf):
            extreme = ~((size > _SMALLEST[size.dtype]) & (size < np.inf))
            residual[extreme] = _scaled_residual(_select(x, extreme), _select(fx, extreme), floor)
        if self.first_size is None:
            self.first_size = results.first_size = np.where(size < np.inf, size, 0)
        elif extreme is not None:
            vanished = np.maximum(size, change) < np.finfo(size.dtype).eps ** 3 * self.first_size
            residual[vanished] = change[vanished] / self.first_size[vanished]
        self.largest = change if self.largest is None else np.maximum(self.largest, change)
        if residual.min() <= results.rtol:
            rounding = 4 * torch.finfo(dtype).eps * size
            outgrown = (
                (size > 2 * self.first_size)
                & (results.rtol * (size + floor) > self.largest)
                & (change + rounding > 0.5 * self.largest)
            )
            residual[outgrown] = np.maximum(residual[outgrown], 1)
        return residual

    def _keep_best(self, better: np.ndarray, residual: np.ndarray) -> None:
        # The usual case by reference, since iterates are never changed in place; what has finished is stored.
        if (better | ~self.live).all():
            self.best_x, self.best = self.x, residual
        elif better.any():
            self.best_x = _put(self.best_x, better, _select(self.x, better))
            self.best = np.where(better, residual, self.best)

    def _hand_over(self, slow: np.ndarray, better: np.ndarray, fx: Tensor) -> None:
        """Leave slow samples to the next stage: at f(x) where x is the best so far, else at the best."""
        if slow.any():
            ahead = slow & better
            self.start = _put(self.start, self.rows[slow], _select(self.best_x, slow))
            self.start = _put(self.start, self.rows[ahead], _select(fx, ahead))
            self.results.residual[self.rows[slow]] = self.best[slow]
            self.handed[self.rows[slow]] = True
            self.live = self.live & ~slow

    def _drop_finished(self) -> Tensor | None:
        """Shrink the batch to the live rows when it pays; returns their indices if it was done."""
        live = self.live
        remaining = np.count_nonzero(live)
        if remaining > _COMPACT_BELOW * len(live):
            return None
        if self.f.check_interval > 1 and (len(live) - remaining) * self.x.shape[1] < _COMPACT_FROM:
            return None
        kept = _tensor(live.nonzero()[0], self.x)
        f = self.f.take(kept)
        if f is None:
            return None
        self.f, self.x, self.best_x = f, self.x.index_select(0, kept), self.best_x.index_select(0, kept)
        self.rows, self.best, self.before = self.rows[live], self.best[live], self.before[live]
        self.previous, self.first_size, self.largest = (
            None if figures is None else figures[live] for figures in (self.previous, self.first_size, self.largest)
        )
        self.live = live[live]
        return kept


def _first_look(interval: int, rtol: float) -> int:
    """The evaluation that is looked at first; right behind an extrapolation, like all that follow."""
    if interval == 1:
        return 1
    intervals = round((log(rtol) / log(_USUAL_RATE) - 1) / interval) if rtol < 1 else 1
    return 1 + interval * min(max(intervals, 1), _LATEST_FIRST)


def _tensor(figures: np.ndarray, like: Tensor) -> Tensor:
    """On the device of ``like``; on the CPU without a copy."""
    tensor = torch.from_numpy(figures)
    return tensor if like.device.type == "cpu" else tensor.to(like.device)


def _scaled_residual(x: Tensor, fx: Tensor, floor: float) -> np.ndarray:
    """The residual of rows that are too small or too large to be squared, in units of their largest entry."""
    x, fx = x.double(), fx.double()
    unit = torch.maximum(fx.abs(), x.abs()).amax(dim=1, keepdim=True).clamp(min=torch.finfo(fx.dtype).tiny)
    finite = torch.isfinite(fx).all(dim=1)
    x, fx = x / unit, fx / unit
    size = torch.linalg.vector_norm(fx, dim=1) + floor / unit.squeeze(1)
    change = torch.linalg.vector_norm(fx - x, dim=1)
    # Where f(x) is 0 and x is not, the next step may well end: only what is not finite is lost.
    residual = torch.where(change == 0, 0.0, change / size).clamp(max=torch.finfo(torch.float32).max)
    scaled: np.ndarray = torch.where(finite, residual, torch.inf).cpu().numpy()
    return scaled


def _select(x: Tensor, which: np.ndarray) -> Tensor:
    return x.index_select(0, _tensor(which.nonzero()[0], x))


def _put(base: Tensor, rows: np.ndarray, values: Tensor) -> Tensor:
    """``base`` with some rows, by mask or by number, replaced; a new tensor, since graphs may share the old one."""
    numbers = rows.nonzero()[0] if rows.dtype == bool else rows
    return base.index_put((_tensor(numbers, base),), values)
