"""What a solve returns, what it reports, and how a miss is made loud."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from ._internal.errors import choice

OnFailure = Literal["raise", "warn", "ignore"]


class ImplicitFunctionWarning(RuntimeWarning):
    """An equilibrium, or its adjoint, was not found to the tolerance."""


class CoupledRowsWarning(ImplicitFunctionWarning):
    """Samples that were solved each on its own influence one another, and the batch had to be solved again as one."""


class ConvergenceError(RuntimeError):
    """An equilibrium was not found to the tolerance and ``on_failure="raise"`` was asked for."""


class Status(IntEnum):
    """Why the solve of a sample ended."""

    #: Within the tolerance.
    CONVERGED = 0
    #: max_steps are spent, and the residual was still falling.
    OUT_OF_STEPS = 1
    #: max_steps are spent, and their second half has not halved the residual.
    STALLED = 2
    #: The state has grown and its steps do not shorten, or lead to where no solution is.
    RUNS_AWAY = 3
    #: f was not finite at the last step.
    NOT_FINITE = 4


@dataclass(frozen=True)
class SolveStats:
    """The figures of a solve, one entry per sample, as `Report` describes them."""

    residual: Tensor
    steps: Tensor
    converged: Tensor
    trace: Tensor | None = None
    status: Tensor | None = None  # (batch,) of `Status`

    def of_each(self, samples: int) -> SolveStats:
        """The figures of the one row that holds a coupled batch, as those of every sample in it."""
        return SolveStats(
            self.residual.expand(samples),
            self.steps.expand(samples),
            self.converged.expand(samples),
            None if self.trace is None else self.trace.expand(-1, samples),
            None if self.status is None else self.status.expand(samples),
        )

    def after(self, earlier: SolveStats) -> SolveStats:
        """The figures with the evaluations of an earlier solve of the same samples counted too."""
        traces = [stats.trace for stats in (earlier, self) if stats.trace is not None]
        trace = torch.cat(traces) if len(traces) == 2 else None
        return SolveStats(self.residual, earlier.steps + self.steps, self.converged, trace, self.status)


@dataclass(repr=False)
class BackwardReport:
    """The figures of the adjoint solve v = g + Jᵀv; all None until backward has run."""

    stats: SolveStats | None = None

    @property
    def residual(self) -> Tensor | None:
        return None if self.stats is None else self.stats.residual

    @property
    def steps(self) -> Tensor | None:
        return None if self.stats is None else self.stats.steps

    @property
    def converged(self) -> Tensor | None:
        return None if self.stats is None else self.stats.converged

    @property
    def trace(self) -> Tensor | None:
        return None if self.stats is None else self.stats.trace

    def __repr__(self) -> str:
        return _shown(self, *_SHOWN)


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """How well a solution of x = f(x, *args) was found, without its value and its graph.

    Attributes:
        stats: what the properties below read.
        backward: the same figures of the adjoint solve, filled when backward runs.
    """

    stats: SolveStats
    backward: BackwardReport = field(default_factory=BackwardReport)

    @property
    def residual(self) -> Tensor:
        """(batch,)  ‖f(x) − x‖₂ / (atol/rtol + ‖f(x)‖₂) of the value that is returned; of several parts, the largest.

        It is inf where f is not finite.  Where the state has grown until its tolerance says nothing, it is the
        estimated distance to a solution relative to the state's size, √rtol at least.
        """
        return self.stats.residual

    @property
    def steps(self) -> Tensor:
        """(batch,) evaluations of f spent on the sample."""
        return self.stats.steps

    @property
    def converged(self) -> Tensor:
        """(batch,) whether ‖f(x) − x‖₂ ≤ atol + rtol ‖f(x)‖₂ for every part, that is, whether residual ≤ rtol."""
        return self.stats.converged

    @property
    def trace(self) -> Tensor | None:
        """(checks, batch) the residual at each check, NaN after a sample has finished; None unless asked for."""
        return self.stats.trace

    @property
    def status(self) -> Tensor | None:
        """(batch,) why the solve of the sample ended, as a `Status`; None inside a transform."""
        return self.stats.status

    def __repr__(self) -> str:
        return _shown(self, *_SHOWN, "backward")


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution(Report):
    """The solution of x = f(x, *args), one row per sample, and the `Report` of how well it was found.

    Attributes:
        value: the state, (batch, \\*state), or a tuple of such; it carries the gradient.
    """

    value: Tensor | tuple[Tensor, ...]

    def report(self) -> Report:
        """The figures without the value; those of the backward solve still arrive when it runs."""
        return Report(stats=self.stats, backward=self.backward)

    def __repr__(self) -> str:
        return _shown(self, "value", *_SHOWN, "backward")


_SHOWN = ("residual", "steps", "converged", "trace")


def _shown(report: object, *names: str) -> str:
    """As a dataclass shows itself that has all these for fields."""
    return f"{type(report).__name__}({', '.join(f'{name}={getattr(report, name)!r}' for name in names)})"


class Monitor:
    """Collects the report of every solve, forward and backward, made while it is open.

    It needs nothing from the model: any module that solves an equilibrium somewhere inside is seen.

    Example:
        >>> import torch
        >>> from implicitdl import Monitor, fixed_point
        >>> with Monitor() as monitor:
        ...     x = fixed_point(lambda x: torch.cos(x), torch.zeros(8, 1, dtype=torch.float64)).value
        >>> monitor.samples, monitor.missed
        (8, 0.0)
    """

    def __init__(self) -> None:
        self.forward: list[SolveStats] = []
        self.backward: list[SolveStats] = []

    def __enter__(self) -> Monitor:
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.remove(self)

    @property
    def samples(self) -> int:
        """Samples solved forward (a sample solved twice counts twice)."""
        return sum(stats.steps.numel() for stats in self.forward)

    @property
    def forward_steps(self) -> float:
        """Mean evaluations of f per sample; NaN when nothing was solved."""
        return _mean_steps(self.forward)

    @property
    def backward_steps(self) -> float:
        """Mean evaluations of the adjoint map per sample; NaN when nothing was solved."""
        return _mean_steps(self.backward)

    @property
    def missed(self) -> float:
        """Share of the samples, forward and backward, that did not reach the tolerance."""
        verdicts = [stats.converged for stats in self.forward + self.backward]
        total = sum(converged.numel() for converged in verdicts)
        return sum(int((~converged).sum()) for converged in verdicts) / total if total else 0.0


def _mean_steps(solves: list[SolveStats]) -> float:
    total = sum(stats.steps.numel() for stats in solves)
    return sum(int(stats.steps.sum()) for stats in solves) / total if total else float("nan")


# Not thread-local: autograd runs backward on threads of its own, and the adjoint's report belongs to the
# monitor that the training loop opened.
_open: list[Monitor] = []
_lock = threading.Lock()


def monitored(direction: Literal["forward", "backward"], stats: SolveStats) -> None:
    """Hand the figures of a solve to the open monitors."""
    if _open:
        with _lock:
            for monitor in _open:
                getattr(monitor, direction).append(stats)


def check_on_failure(who: str, value: str) -> None:
    choice(who, "on_failure", value, ("raise", "warn", "ignore"))
