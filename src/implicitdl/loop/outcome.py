"""What a solve has found: the figures of every sample while it runs, and the outcome in the end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..equations.map import RowMap
from ..kernels import sweeps as kernel
from ..kernels.sweeps import Swept
from ..solution import Figures, Measured, Status
from ..solvers.base import Solver
from ..solvers.inverse import InverseEstimate
from .indexing import on_device

# Iterates up to this many numbers are kept whole for the sake of the samples that ended with them: a reference is free.
_HOLD_UP_TO = 1 << 18


@dataclass(slots=True)
class Outcome:
    """What the loop found: the best iterate of every sample and its figures, as `Solution` describes them.

    Attributes:
        slope: φ' at x, of an `Equilibrium` that the compiled loop has solved; None otherwise.
        apart: whether samples ended at different evaluations, so that none was made with all at their solutions.
        fx: f(x) of the whole batch, where an adjoint needed it.
        inverse: (I − J)⁻¹ as the solver knew it when each sample finished; None where the solver estimates none, or
            it was not asked for.
    """

    x: Tensor
    figures: Figures
    all_converged: bool
    rtol: float
    inverse: InverseEstimate | None = None
    slope: Tensor | None = None
    apart: bool = False
    fx: Tensor | None = None

    @classmethod
    def of(cls, swept: Swept, solver: Solver) -> Outcome:
        """That of a compiled loop which has solved every row."""
        return cls(swept.x, swept.figures, True, solver.tolerance(swept.x.dtype), None, swept.slope)

    def of_each(self, samples: int) -> Outcome:
        """The figures of the one row that holds a coupled batch, as those of every sample in it."""
        one = self.figures
        trace = None if one.trace is None else one.trace.expand(-1, samples)
        status = None if one.status is None else one.status.expand(samples)
        each = Measured(
            one.residual.expand(samples), one.steps.expand(samples), one.converged.expand(samples), trace, status
        )
        return replace(self, figures=each)


class Results:
    """The figures of the whole batch, kept on the host, and what every finished sample ended with."""

    def __init__(self, f: RowMap, x: Tensor, solver: Solver, trace: bool, keep_inverse: bool) -> None:
        batch = x.shape[0]
        self.solver = solver
        # That of f where it is less than that of its values: under autocast.
        self.precision: torch.dtype | None = getattr(f, "precision", None)
        self.set_tolerance(x.dtype)
        self.residual = np.full(batch, np.inf)
        self.steps = np.zeros(batch, dtype=np.int64)
        self.status = np.full(batch, Status.OUT_OF_STEPS, dtype=np.int8)
        self.first_size: np.ndarray | None = None  # (parts, batch)
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
            self._finished.append((rows[ended], None, x.index_select(0, on_device(ended, x))))
        else:
            self._finished.append((rows[ended], ended, x))

    def take_over(self, x: Tensor, swept: Swept) -> tuple[Tensor, np.ndarray]:
        """Keep what a compiled loop has solved; the other rows, and where the next stage is to start."""
        status, rows = swept.figures.endings(), np.arange(len(self.residual))
        done = status == kernel.DONE
        self.steps = swept.figures.steps.numpy()
        self.status[done] = Status.CONVERGED
        if done.any():
            self.finish(rows, done, swept.x, swept.figures.residual.numpy())
        return torch.where(on_device((status == kernel.SLOW)[:, None], x), swept.x, x), rows[~done]

    def keep(self, rows: np.ndarray, which: np.ndarray, inverse: InverseEstimate | None) -> None:
        """Store the inverse estimate of those of ``rows`` that ``which`` marks."""
        if inverse is not None:
            self._inverses.append(
                (on_device(rows[which], inverse.left), inverse.take(on_device(which.nonzero()[0], inverse.left)))
            )

    def outcome(self) -> Outcome:
        x = self._values()
        precision = np.float64 if x.dtype == torch.float64 else np.float32
        trace = self.trace
        if trace is not None:
            trace = trace[: max(int(self.steps.max()), 1)]
        measured = Measured(
            residual=on_device(self.residual.astype(precision), x),
            steps=on_device(self.steps, x),
            converged=on_device(self.status == Status.CONVERGED, x),
            trace=None if trace is None else on_device(trace.astype(precision), x),
            status=on_device(self.status, x),
        )
        return Outcome(
            x=x,
            figures=measured,
            all_converged=bool((self.status == Status.CONVERGED).all()),
            rtol=self.rtol,
            inverse=InverseEstimate.merged(len(self.residual), self._inverses) if self._inverses else None,
            apart=len(self._finished) > 1,
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
