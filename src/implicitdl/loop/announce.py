"""The figures of a solve, handed to the open monitors; a miss in words: how many, why, and the change that helps."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from ..solution import ConvergenceError, Figures, ImplicitFunctionWarning, OnFailure, Status, monitored
from ..solvers import GMRES, Aitken, Anderson, Auto, Broyden, Newton, Picard, Solver
from .outcome import Outcome

Direction = Literal["forward", "backward"]
# A residual of fewer roundings than this is as small as the dtype lets it become on ordinary maps.
_ROUNDINGS = 100


def announce(who: str, direction: Direction, outcome: Outcome, solver: Solver, on_failure: OnFailure) -> None:
    """Hand the figures to the open monitors and make a miss as loud as was asked for."""
    monitored(direction, outcome.figures)
    if outcome.all_converged or on_failure == "ignore":
        return
    text = f"{who}: {_count(outcome.figures, outcome.rtol)} {_causes(outcome, solver, direction)}"
    if on_failure == "raise":
        raise ConvergenceError(text)
    # One worded line that names the solve is worth more here than a line number inside the library.
    warnings.warn(text, ImplicitFunctionWarning, stacklevel=2)


def _count(figures: Figures, rtol: float) -> str:
    missed = ~figures.converged
    steps = figures.steps[missed]
    fewest, most = int(steps.min()), int(steps.max())
    spent = f"{most}" if fewest == most else f"{fewest} to {most}"
    return (
        f"{int(missed.sum())} of {missed.numel()} samples did not reach rtol={rtol:.0e} in {spent} "
        f"step{'' if most == 1 else 's'} (worst residual {float(figures.residual.max()):.1e})."
    )


def _causes(outcome: Outcome, solver: Solver, direction: Direction) -> str:
    """A sentence, with a remedy, for each way in which samples have missed."""
    figures = outcome.figures
    assert figures.status is not None, "a miss is not what the compiled loops end with"
    missed = ~figures.converged
    sentences = []
    for status in (Status.NOT_FINITE, Status.RUNS_AWAY, Status.STALLED, Status.OUT_OF_STEPS):
        which = missed & (figures.status == status)
        count = int(which.sum())
        if count == 0:
            continue
        if status is Status.NOT_FINITE:
            cause = f"f was not finite at step {int(figures.steps[which].min())}"
            remedy = _finite(direction)
        elif status is Status.RUNS_AWAY:
            cause, remedy = "The state grows and its steps do not shorten", _runaway(solver, direction)
        elif status is Status.STALLED:
            worst = float(figures.residual[which].max())
            cause, remedy = "The residual no longer falls", _stalled(outcome, worst, solver, direction)
        else:
            cause, remedy = "The residual was still falling", "raise max_steps."
        share = "" if count == int(missed.sum()) else f", in {count} of them"
        sentences.append(f"{cause}{share}: {remedy}")
    return " ".join(sentences)


def _finite(direction: Direction) -> str:
    where = "the gradient that came in" if direction == "backward" else "the input and x0"
    return f"look for NaN and infinity in {where}, and in the weights."


def _runaway(solver: Solver, direction: Direction) -> str:
    if direction == "backward":
        return "the Jacobian has eigenvalues of 1 or more in modulus. Pass ImplicitAdjoint(solver=GMRES())."
    if isinstance(solver, (Newton, Broyden)):
        return "there may be no solution, or none near x0=."
    return "the map expands, or has no fixed point. Pass solver=Newton(), which solves maps that expand too."


def _stalled(outcome: Outcome, worst: float, solver: Solver, direction: Direction) -> str:
    dtype = outcome.x.dtype
    if worst < _ROUNDINGS * torch.finfo(dtype).eps:
        return f"this is the rounding of {str(dtype).removeprefix('torch.')}. Raise rtol, or compute in a wider dtype."
    if isinstance(solver, Broyden):
        return f"raise memory, which is {solver.memory}, to 100 and more, or pass Newton()."
    if isinstance(solver, GMRES):
        return f"raise restart, which is {solver.restart}; I − J may be singular."
    if direction == "backward":
        return "pass ImplicitAdjoint(solver=GMRES())."
    if isinstance(solver, (Picard, Aitken)):
        return "check that the map is a contraction, or pass solver=Anderson() or Newton()."
    if isinstance(solver, (Auto, Anderson)):
        return "check that the map is a contraction, or pass solver=Newton() or Broyden(memory=100)."
    return "pass x0= nearer to the solution; f may have a kink, or no solution, here."
