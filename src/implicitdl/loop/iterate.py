"""The one loop: a solver's stages in turn, until every sample is solved, lost or out of steps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..equations.map import RowMap
from ..kernels.sweeps import Swept
from ..solvers.base import Solver
from .outcome import Outcome, Results
from .stage import Stage


def iterate(
    f: RowMap, x: Tensor | None, solver: Solver, *, trace: bool = False, keep_inverse: bool = False,
    swept: Swept | None = None,
) -> Outcome:  # fmt: skip
    """Solve x = f(x) for every row of x, each to the solver's tolerance or to its best iterate.

    Without an x the start is f(0), of an `Equilibrium` or its adjoint.  ``swept`` is the first stage, if it has been.
    """
    if swept is None and not (trace or keep_inverse or torch.is_grad_enabled()):
        swept = solver.first_stage(f, x)
    if swept is not None and not swept.unsolved:
        return Outcome.of(swept, solver)
    if x is None:
        x = f.after_zero()  # type: ignore[attr-defined]
    results = Results(f, x, solver, trace, keep_inverse)
    rows, stages = np.arange(x.shape[0]), solver.stages(f)
    if swept is not None:
        next(stages)
        x, rows = results.take_over(x, swept)
    best_x = x
    with np.errstate(all="ignore"):  # a diverging sample is reported by its residual
        for method in stages:
            x, best_x, rows = Stage(f, x, best_x, rows, method, results).run()
            if not rows.size:
                break
    return results.outcome()
