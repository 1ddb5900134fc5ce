"""What a solve returns, what it reports, and how a miss is made loud."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Literal, Protocol

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


class Figures(Protocol):
    """What a solve says of every sample; `Report` has the meaning."""

    @property
    def residual(self) -> Tensor: ...

    @property
    def steps(self) -> Tensor: ...

    @property
    def converged(self) -> Tensor: ...

    @property
    def trace(self) -> Tensor | None: ...

    @property
    def status(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Measured:
    """`Figures` that are there."""

    residual: Tensor
    steps: Tensor
    converged: Tensor
    trace: Tensor | None = None
    status: Tensor | None = None  # (batch,) of `Status`


@dataclass(repr=False)
class BackwardReport:
    """The figures of the adjoint solve v = g + Jᵀv; all None until backward has run."""

    figures: Figures | None = None

    @property
    def residual(self) -> Tensor | None:
        return None if self.figures is None else self.figures.residual

    @property
    def steps(self) -> Tensor | None:
        return None if self.figures is None else self.figures.steps

    @property
    def converged(self) -> Tensor | None:
        return None if self.figures is None else self.figures.converged

    @property
    def trace(self) -> Tensor | None:
        return None if self.figures is None else self.figures.trace

    def __repr__(self) -> str:
        return _shown(self, *_FIGURES)


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """How well a solution of x = f(x, *args) was found, without its value and its graph.

    Attributes:
        figures: what the properties below read.
        backward: the same figures of the adjoint solve, filled when backward runs.
    """

    figures: Figures
    backward: BackwardReport = field(default_factory=BackwardReport)

    @property
    def residual(self) -> Tensor:
        """(batch,)  ‖f(x) − x‖₂ / (atol/rtol + ‖f(x)‖₂) of the value that is returned; of several parts, the largest.

        It is inf where f is not finite.  Where the state has grown until its tolerance says nothing, it is the
        estimated distance to a solution relative to the state's size, √rtol at least.
        """
        return self.figures.residual

    @property
    def steps(self) -> Tensor:
        """(batch,) evaluations of f spent on the sample."""
        return self.figures.steps

    @property
    def converged(self) -> Tensor:
        """(batch,) whether ‖f(x) − x‖₂ ≤ atol + rtol ‖f(x)‖₂ for every part, that is, whether residual ≤ rtol."""
        return self.figures.converged

    @property
    def trace(self) -> Tensor | None:
        """(checks, batch) the residual at each check, NaN after a sample has finished; None unless asked for."""
        return self.figures.trace

    @property
    def status(self) -> Tensor | None:
        """(batch,) why the solve of the sample ended, as a `Status`; None inside a transform."""
        return self.figures.status

    def __repr__(self) -> str:
        return _shown(self, *_FIGURES, "backward")


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution(Report):
    """The solution of x = f(x, *args), one row per sample, and the `Report` of how well it was found.

    Attributes:
        value: the state, (batch, \\*state), or a tuple of such; it carries the gradient.
    """

    value: Tensor | tuple[Tensor, ...]

    def report(self) -> Report:
        """The figures without the value; those of the backward solve still arrive when it runs."""
        return Report(figures=self.figures, backward=self.backward)

    def __repr__(self) -> str:
        return _shown(self, "value", *_FIGURES, "backward")


_FIGURES = ("residual", "steps", "converged", "trace")


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
        self.forward: list[Figures] = []
        self.backward: list[Figures] = []

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
        return sum(figures.steps.numel() for figures in self.forward)

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
        verdicts = [figures.converged for figures in self.forward + self.backward]
        total = sum(converged.numel() for converged in verdicts)
        return sum(int((~converged).sum()) for converged in verdicts) / total if total else 0.0


def _mean_steps(solves: list[Figures]) -> float:
    total = sum(figures.steps.numel() for figures in solves)
    return sum(int(figures.steps.sum()) for figures in solves) / total if total else float("nan")


# Not thread-local: autograd runs backward on threads of its own, and the adjoint's report belongs to the
# monitor that the training loop opened.
_open: list[Monitor] = []
_lock = threading.Lock()


def monitored(direction: Literal["forward", "backward"], figures: Figures) -> None:
    """Hand the figures of a solve to the open monitors."""
    if _open:
        with _lock:
            for monitor in _open:
                getattr(monitor, direction).append(figures)


def check_on_failure(who: str, value: str) -> None:
    choice(who, "on_failure", value, ("raise", "warn", "ignore"))
