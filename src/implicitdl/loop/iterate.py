"""The loop: the methods of a solver in turn, until every sample is solved, lost or out of steps.

A compiled method solves the rows that it can in one call.  Every other one goes through `run_method`, which owns the
stopping of each sample.  Bookkeeping is done on the host in numpy: on a small model a handful of torch operations per
check would cost more than the sweeps between two checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._internal.context import without_grad
from .._internal.errors import wrong
from ..equations.map import LinearMap, Map
from ..kernels import loops as kernel
from ..kernels.loops import Swept
from ..solution import SolveStats, Status
from ..solvers.auto import CompiledSweeps
from ..solvers.base import Solver
from ..solvers.state import InverseEstimate, precise
from .correction import Correction
from .indexing import on_device, put, select
from .residual import Residual

# Finished samples leave the batch when half of it has; for a map that calls itself cheap, only when the numbers that
# a sweep would go on computing for nothing outweigh the dozen small operations of taking the others out.
_COMPACT_BELOW = 0.5
_COMPACT_FROM = 1 << 13
# What a sweep leaves of the residual in trained models: where checks are rare, the first one comes when this rate says
# that the tolerance is reached, and after three intervals at most for the sake of the easier ones.
_USUAL_RATE = 0.4
_LATEST_FIRST = 3
# Iterates up to this many numbers are kept whole for the sake of the samples that ended with them: a reference is free.
_HOLD_UP_TO = 1 << 18


@dataclass(slots=True)
class SolveResult:
    """What a solve found: the best iterate of every sample and its figures.

    Attributes:
        x: (batch, d).
        rtol: the relative tolerance that held, which is coarser than the solver's under autocast.
        floor: what the size of f(x) is increased by in the relative residual: atol/rtol, (batch,) in units of x.
        inverse: (I − J)⁻¹ as the solver knew it when each sample finished, where it was asked for and is estimated.
        slope: (batch, d)  φ' at x, of an `Equilibrium` that the compiled loop has solved.
        apart: samples ended at different evaluations, so that none was made with all of them at their solutions.
        fx: f(x) of the whole batch, where an adjoint needed it.
    """

    x: Tensor
    stats: SolveStats
    all_converged: bool
    rtol: float
    floor: Tensor | float
    inverse: InverseEstimate | None = None
    slope: Tensor | None = None
    apart: bool = False
    fx: Tensor | None = None


def iterate(
    f: Map, x: Tensor | None, solver: Solver, *, trace: bool = False, keep_inverse: bool = False, graph: bool = False
) -> SolveResult:
    """Solve x = f(x) for every row of x, each to the solver's tolerance or to its best iterate.

    Arguments:
        f: the map.
        x: (batch, d) where to start; f(0) when None, for maps that know it.
        trace: keep the residual of every evaluation.
        keep_inverse: keep the estimates of (I − J)⁻¹.
        graph: let autograd follow the steps.

    Raises:
        ArgumentError: a method needs a structure that f does not declare.
    """
    swept: Swept | None = None
    methods = solver.methods(f)
    for method in methods:
        if not isinstance(method, CompiledSweeps):
            break
        swept = None if trace or keep_inverse or graph else method.solve(f, x)
        if swept is not None and not swept.unsolved:
            rtol = solver.tolerance(swept.x.dtype)
            return SolveResult(swept.x, swept.stats, True, rtol, solver.atol / rtol, slope=swept.slope)
    with np.errstate(all="ignore"), torch.enable_grad() if graph else without_grad():
        # A diverging sample is reported by its residual.
        return _run_methods(method, methods, f, x, swept, solver, trace, keep_inverse)


def _run_methods(
    method: Solver,
    others: Iterator[Solver],
    f: Map,
    x: Tensor | None,
    swept: Swept | None,
    solver: Solver,
    trace: bool,
    keep_inverse: bool,
) -> SolveResult:
    """Go on with the method, and others behind it, on the rows that a compiled method has not solved."""
    unit: Tensor | None = None
    if isinstance(f, LinearMap):
        unit = unit_of(f.constant)
        f, x = f.divided(unit), None if x is None else x / unit
    x = f.after_zero() if x is None else x
    progress = Progress(f, x, solver, trace, keep_inverse)
    rows, best_x = np.arange(len(x)), x
    if swept is not None:
        x, rows = progress.take_over(x, swept, unit)
        best_x = x
    while True:
        x, best_x, rows = run_method(method, f, x, best_x, rows, progress)
        if not rows.size:
            break
        method = next(others)
    result = progress.result()
    if unit is not None:
        result.x, result.floor = result.x * unit, result.floor * unit.squeeze(1)
    return result


def unit_of(g: Tensor) -> Tensor:
    """Powers of two, (batch, 1), in units of which the largest entries of g are from 1 to 2.

    Squared norms of 1e-23 and less would underflow in float32; powers of two change no digit.
    """
    largest = torch.linalg.vector_norm(g, ord=float("inf"), dim=1, keepdim=True).to(precise(g.dtype))
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1).to(g.dtype)


def run_method(
    method: Solver, f: Map, x: Tensor, best_x: Tensor, waiting: np.ndarray, progress: Progress
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Let one method work on the ``waiting`` samples, each to its own tolerance.

    The residual is checked at step numbers that depend on the method and the map only, never on the batch: a sample
    stops where it would have stopped alone, up to the rounding of f.

    Returns:
        Where the next method should start, the best iterates so far, and the samples that it should take.
    """
    if not method.serves(f):
        raise wrong(type(method).__name__, *method.needs(f))
    at = _Working.of(f, x, best_x, waiting, progress)
    start, kept, handed = x, best_x, np.zeros(len(x), dtype=bool)
    at.drop_finished()
    interval, solver, trace = method.check_interval(at.f), progress.solver, progress.trace
    state = method.init(at.f, at.x)
    fx = method.evaluate(at.f, at.x, state)
    if fx.dtype != at.x.dtype:  # autocast decides the dtype of the state
        start, kept, at.x, at.best_x = (tensor.to(fx.dtype) for tensor in (start, kept, at.x, at.best_x))
    progress.set_tolerance(fx.dtype)
    rtol, budget = progress.rtol, solver.max_steps - int(at.before.max())
    first, spent, sweep = _first_check(interval, rtol), 1, 1
    if first > 1 and trace is None and not f.root:
        at.residual.begin(at.f, at.x, fx)
    while True:
        scheduled = sweep >= first and (sweep - first) % interval == 0
        if scheduled or spent >= budget or trace is not None:
            were_live = at.live
            residual = at.measure(method, fx, state, progress)
            if scheduled:
                at.try_zero(residual, spent, progress)
            live, total = at.live, at.before + spent
            if 2 * spent >= budget and at.halfway is None:
                at.halfway = at.best
            if trace is not None:
                trace[np.minimum(total[live], len(trace)) - 1, at.rows[live]] = residual[live]
            out_of_steps = total >= solver.max_steps
            # A check for the sake of one sample's budget, or of the trace, must not decide on the others.
            due = live if scheduled else live & out_of_steps
            better = due & (residual < at.best)
            at.keep_best(better, residual)
            done = due & (residual <= rtol)
            lost = due & ~np.isfinite(residual) & ~(method.recovers & np.isfinite(at.best))
            ended = done | lost | (due & out_of_steps)
            if scheduled:
                slow = None if at.previous is None else method.hand_over(residual, at.previous, interval, rtol)
                if slow is not None and (slow := slow & live & ~ended).any():
                    # The next method starts at f(x) where x is the best so far, else at the best.
                    gone, ahead = at.rows[slow], slow & better
                    at_best = select(at.best_x, slow)
                    kept = put(kept, gone, at_best)
                    start = put(put(start, gone, at_best), at.rows[ahead], select(fx, ahead))
                    progress.residual[gone], handed[gone] = at.best[slow], True
                    at.live = at.live & ~slow
                at.previous = residual
            if ended.any():
                progress.finish(at.rows, ended, at.best_x, at.best, at.why(done, lost))
                at.live = at.live & ~ended
            progress.steps[at.rows[due]] = total[due]
            if at.live is not were_live:
                if progress.keep_inverse:
                    progress.keep(at.rows, were_live & ~at.live, method.inverse(state))
                if not at.live.any():
                    return start, kept, handed.nonzero()[0]
                staying = at.drop_finished()
                if staying is not None:
                    state, fx = method.take(state, staying), fx.index_select(0, staying)
        at.last = at.x, fx
        value = at.x + fx if f.root and not method.by_residual else fx
        at.x, state, extra = method.step(at.f, at.x, value, state)
        fx = method.evaluate(at.f, at.x, state)
        spent += 1 + extra
        sweep += 1


@dataclass(slots=True)
class _Working:
    """The samples that a method works on, one row each, some of which may have ended.

    Attributes:
        rows: batch numbers.
        live: which are still being solved.
        best_x, best: the best iterates and their residuals.
        before: evaluations spent by earlier methods.
        previous: residuals of the check before.
        halfway: the best residuals when half of the steps were spent.
        last: x and f(x) of the evaluation before.
    """

    f: Map
    x: Tensor
    best_x: Tensor
    rows: np.ndarray
    live: np.ndarray
    best: np.ndarray
    before: np.ndarray
    residual: Residual
    previous: np.ndarray | None = None
    halfway: np.ndarray | None = None
    last: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, f: Map, x: Tensor, best_x: Tensor, waiting: np.ndarray, progress: Progress) -> _Working:
        live = np.zeros(len(x), dtype=bool)
        live[waiting] = True
        residual = (Correction if f.root else Residual)(progress.first_size)
        return cls(f, x, best_x, np.arange(len(x)), live, progress.residual.copy(), progress.steps.copy(), residual)

    def measure(self, method: Solver, fx: Tensor, state: Any, progress: Progress) -> np.ndarray:
        """The relative residuals at x, (batch,)."""
        f, x, rtol, atol = self.f, self.x, progress.rtol, progress.solver.atol
        norms, more = None, {}
        if f.root:
            more["correction"] = method.correction(f, x, fx, state)
        elif f.parts is None and not torch.is_grad_enabled() and type(f).observed is Map.observed:
            norms = method.norms(x, fx, state)
        with without_grad():
            residual: np.ndarray = self.residual(
                f,
                x,
                fx,
                norms,
                rtol,
                atol,
                before=self.last,
                exact=method.exact,
                probe=method.by_residual,
                leaps=method.leaps,
                **more,
            )
        if self.residual.probed is not None:
            self.before = self.before + self.residual.probed
        if progress.first_size is None or f.root:
            progress.first_size = self.residual.first_size
        return residual

    def try_zero(self, residual: np.ndarray, spent: int, progress: Progress) -> None:
        """Where parts of a state shrink without end, f itself says whether 0 is the solution that they approach.

        There is nothing that a residual could be relative to.  It costs a row one evaluation each time that a part
        has shrunk by the tolerance.
        """
        if self.residual.vanishing is None:
            return
        steps, rtol = self.before + spent, progress.rtol
        vanishing = self.residual.vanishing & (self.live & (residual > rtol) & (steps < progress.solver.max_steps))
        which: np.ndarray = np.logical_or.reduce(vanishing)
        if not which.any():
            return
        part = self.f.take(on_device(which.nonzero()[0], self.x))
        f, zeros = (self.f, vanishing) if part is None else (part, vanishing[:, which])
        x = self.x.detach() if part is None else select(self.x.detach(), which)
        trial = x.clone()
        for columns, zero in zip(f.parts or (slice(None),), zeros, strict=True):
            trial[:, columns] = torch.where(on_device(zero[:, None], x), 0.0, trial[:, columns])
        with torch.no_grad():
            left = self.residual.fresh()(f, trial, f(trial), None, rtol, progress.solver.atol)
        if part is not None:
            whole = np.full(len(which), np.inf)
            whole[which], left = left, whole
            trial = put(self.x, which, trial)
        self.before = self.before + which
        for i, zero in enumerate(vanishing):
            self.residual.tried_zero(i, zero)
        found = which & (left <= rtol)
        if found.any():
            progress.finish(self.rows, found, trial, left, np.full(len(found), Status.CONVERGED))
            progress.steps[self.rows[found]] = (self.before + spent)[found]
            self.live = self.live & ~found

    def keep_best(self, better: np.ndarray, residual: np.ndarray) -> None:
        # The usual case by reference, since iterates are never changed in place; what has finished is stored.
        if (better | ~self.live).all():
            self.best_x, self.best = self.x, residual
        elif better.any():
            self.best_x = put(self.best_x, better, select(self.x, better))
            self.best = np.where(better, residual, self.best)

    def why(self, done: np.ndarray, lost: np.ndarray) -> np.ndarray:
        """The `Status` of samples that end here."""
        halfway = self.best if self.halfway is None else self.halfway
        no_better = np.where(2 * self.best > halfway, Status.STALLED, Status.OUT_OF_STEPS)
        return np.select(
            [done, self.residual.away, lost], [Status.CONVERGED, Status.RUNS_AWAY, Status.NOT_FINITE], no_better
        )  # fmt: skip

    def drop_finished(self) -> Tensor | None:
        """Shrink the batch to the live rows when it pays; returns their numbers if it was done."""
        live = self.live
        remaining = np.count_nonzero(live)
        if remaining > _COMPACT_BELOW * len(live):
            return None
        if self.f.check_interval > 1 and (len(live) - remaining) * self.x.shape[1] < _COMPACT_FROM:
            return None
        staying = on_device(live.nonzero()[0], self.x)
        f = self.f.take(staying)
        if f is None:
            return None
        self.f = f
        for name in ("rows", "best", "before", "previous", "halfway"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[live])
        self.x, self.best_x = self.x.index_select(0, staying), self.best_x.index_select(0, staying)
        if self.last is not None:
            self.last = self.last[0].index_select(0, staying), self.last[1].index_select(0, staying)
        self.residual.take(live)
        self.live = live[live]
        return staying


class Progress:
    """The figures of the whole batch, kept on the host, and what every finished sample ended with."""

    def __init__(self, f: Map, x: Tensor, solver: Solver, trace: bool, keep_inverse: bool) -> None:
        batch = x.shape[0]
        self.solver, self.precision, self.keep_inverse = solver, f.precision, keep_inverse
        self.set_tolerance(x.dtype)
        self.residual = np.full(batch, np.inf)
        self.steps = np.zeros(batch, dtype=np.int64)
        self.status = np.full(batch, Status.OUT_OF_STEPS, dtype=np.int8)
        self.first_size: np.ndarray | None = None  # (parts, batch)
        self.trace = np.full((solver.max_steps, batch), np.nan) if trace else None
        # Groups of finished rows: their numbers in the batch, in the tensor that holds their values, and the tensor.
        self._finished: list[tuple[np.ndarray, np.ndarray | None, Tensor]] = []
        self._inverses: list[tuple[Tensor, InverseEstimate]] = []

    def set_tolerance(self, dtype: torch.dtype) -> None:
        """The tolerance for values of this dtype, or the coarser one of the precision that they are computed in."""
        own = self.solver.tolerance(dtype)
        self.rtol = own if self.precision is None else max(own, self.solver.tolerance(self.precision))

    def finish(self, rows: np.ndarray, which: np.ndarray, x: Tensor, residual: np.ndarray, status: np.ndarray) -> None:
        """Store value, residual and status of those of ``rows`` that ``which`` marks."""
        ended = which.nonzero()[0]
        gone = rows[ended]
        self.residual[gone], self.status[gone] = residual[ended], status[ended]
        if which.all():
            self._finished.append((rows, None, x))
        elif x.numel() > _HOLD_UP_TO:
            self._finished.append((gone, None, x.index_select(0, on_device(ended, x))))
        else:
            self._finished.append((gone, ended, x))

    def take_over(self, x: Tensor, swept: Swept, unit: Tensor | None) -> tuple[Tensor, np.ndarray]:
        """Keep what a compiled method has solved; where the next method is to start, and the other rows."""
        endings, rows = swept.stats.endings(), np.arange(len(self.residual))
        done = endings == kernel.DONE
        self.steps = swept.stats.steps.numpy()
        found = swept.x if unit is None else swept.x / unit
        if done.any():
            self.finish(rows, done, found, swept.stats.residual.numpy(), np.full(len(rows), Status.CONVERGED))
        return torch.where(on_device((endings == kernel.SLOW)[:, None], x), found, x), rows[~done]

    def keep(self, rows: np.ndarray, which: np.ndarray, inverse: InverseEstimate | None) -> None:
        """Store the inverse estimate of those of ``rows`` that ``which`` marks."""
        if inverse is not None:
            self._inverses.append(
                (on_device(rows[which], inverse.left), inverse.take(on_device(which.nonzero()[0], inverse.left)))
            )

    def result(self) -> SolveResult:
        x, trace = self._values(), self.trace
        precision = np.float64 if x.dtype == torch.float64 else np.float32
        if trace is not None:
            trace = trace[: max(int(self.steps.max()), 1)]
        converged = self.status == Status.CONVERGED
        stats = SolveStats(
            residual=on_device(self.residual.astype(precision), x),
            steps=on_device(self.steps, x),
            converged=on_device(converged, x),
            trace=None if trace is None else on_device(trace.astype(precision), x),
            status=on_device(self.status, x),
        )
        inverse = InverseEstimate.merged(len(self.residual), self._inverses) if self._inverses else None
        floor = self.solver.atol / self.rtol
        apart = len(self._finished) > 1
        return SolveResult(x, stats, bool(converged.all()), self.rtol, floor, inverse, apart=apart)

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


def _first_check(interval: int, rtol: float) -> int:
    """The evaluation that is checked first; right behind an extrapolation, like all that follow."""
    if interval == 1:
        return 1
    intervals = round((log(rtol) / log(_USUAL_RATE) - 1) / interval) if rtol < 1 else 1
    return 1 + interval * min(max(intervals, 1), _LATEST_FIRST)
