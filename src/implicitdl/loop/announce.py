"""A miss in words: how many, why, and the change that helps."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from ..solution import ConvergenceError, ImplicitFunctionWarning, OnFailure, SolveStats, Status
from ..solvers import (
    GMRES,
    Aitken,
    Anderson,
    Auto,
    Broyden,
    ForwardBackward,
    Newton,
    PeacemanRachford,
    Picard,
    Solver,
)
from .iterate import SolveResult

Direction = Literal["forward", "backward"]
# Sums of squares overflow before the squares do.
_LARGE = 0.01
# A residual of fewer roundings than this is as small as the dtype lets it become on ordinary maps.
_ROUNDINGS = 100


def announce_miss(who: str, direction: Direction, result: SolveResult, solver: Solver, on_failure: OnFailure) -> None:
    """Make a miss as loud as was asked for."""
    if on_failure == "ignore":
        return
    text = f"{who}: {_count(result.stats, result.rtol)} {_causes(result, solver, direction)}"
    if on_failure == "raise":
        raise ConvergenceError(text)
    # One worded line that names the solve is worth more here than a line number inside the library.
    warnings.warn(text, ImplicitFunctionWarning, stacklevel=2)


def _count(stats: SolveStats, rtol: float) -> str:
    missed = ~stats.converged
    steps = stats.steps[missed]
    fewest, most = int(steps.min()), int(steps.max())
    spent = f"{most}" if fewest == most else f"{fewest} to {most}"
    return (
        f"{int(missed.sum())} of {missed.numel()} samples did not reach rtol={rtol:.0e} in {spent} "
        f"step{'' if most == 1 else 's'} (worst residual {float(stats.residual.max()):.1e})."
    )


def _causes(result: SolveResult, solver: Solver, direction: Direction) -> str:
    """A sentence, with a remedy, for each way in which samples have missed."""
    stats = result.stats
    assert stats.status is not None, "a miss is not what the compiled loops end with"
    missed = ~stats.converged
    dtype = result.x.dtype
    # Of numbers so large, and of what f makes of them, the scalar products of the methods overflow.
    large = missed & (result.x.detach().abs().amax(dim=1) > _LARGE * torch.finfo(dtype).max ** 0.5).to(missed.device)
    total, missed = int(missed.sum()), missed & ~large
    share = _share(int(large.sum()), total)
    sentences = [
        f"The squares of the state overflow {str(dtype).removeprefix('torch.')}{share}: measure it in other units, or "
        "compute in a wider dtype."
    ] * bool(large.any())
    for status in (Status.NOT_FINITE, Status.RUNS_AWAY, Status.STALLED, Status.OUT_OF_STEPS):
        which = missed & (stats.status == status)
        count = int(which.sum())
        if count == 0:
            continue
        if status is Status.NOT_FINITE:
            cause = f"f was not finite at step {int(stats.steps[which].min())}"
            remedy = _finite(direction)
        elif status is Status.RUNS_AWAY:
            cause, remedy = "The state grows and its steps do not shorten", _runaway(solver, direction)
        elif status is Status.STALLED:
            worst = float(stats.residual[which].max())
            cause, remedy = "The residual no longer falls", _stalled(result, worst, solver, direction)
        else:
            cause, remedy = "The residual was still falling", "raise max_steps."
        sentences.append(f"{cause}{_share(count, total)}: {remedy}")
    return " ".join(sentences)


def _share(count: int, total: int) -> str:
    return "" if count == total else f", in {count} of them"


def _finite(direction: Direction) -> str:
    where = "the gradient that came in" if direction == "backward" else "the input and x0"
    return f"look for NaN and infinity in {where}, and in the weights."


def _runaway(solver: Solver, direction: Direction) -> str:
    if direction == "backward":
        return "the Jacobian has eigenvalues of 1 or more in modulus. Pass ImplicitAdjoint(solver=GMRES())."
    if isinstance(solver, (Newton, Broyden)):
        return "there may be no solution, or none near x0=."
    return "the map expands, or has no fixed point. Pass solver=Newton(), which solves maps that expand too."


def _stalled(result: SolveResult, worst: float, solver: Solver, direction: Direction) -> str:
    dtype = result.x.dtype
    if worst < _ROUNDINGS * torch.finfo(dtype).eps:
        return f"this is the rounding of {str(dtype).removeprefix('torch.')}. Raise rtol, or compute in a wider dtype."
    if isinstance(solver, Broyden):
        return f"raise memory, which is {solver.memory}, to 100 and more, or pass Newton()."
    if isinstance(solver, GMRES):
        return f"raise restart, which is {solver.restart}; I − J may be singular."
    if isinstance(solver, (ForwardBackward, PeacemanRachford)):
        return "what is left may be the rounding of a large A: raise rtol, compute in a wider dtype, or pass Newton()."
    if direction == "backward":
        return "pass ImplicitAdjoint(solver=GMRES())."
    if isinstance(solver, (Picard, Aitken)):
        return "check that the map is a contraction, or pass solver=Anderson() or Newton()."
    if isinstance(solver, (Auto, Anderson)):
        return "check that the map is a contraction, or pass solver=Newton() or Broyden(memory=100)."
    return "pass x0= nearer to the solution; f may have a kink, or no solution, here."
