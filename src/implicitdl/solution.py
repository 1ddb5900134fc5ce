"""What a solve returns, what it reports, and how a miss is made loud."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from ._checks import choice

OnFailure = Literal["raise", "warn", "ignore"]


class ImplicitFunctionWarning(RuntimeWarning):
    """An equilibrium, or its adjoint, was not found to the tolerance."""


class ConvergenceError(RuntimeError):
    """An equilibrium was not found to the tolerance and ``on_failure="raise"`` was asked for."""


@dataclass
class BackwardReport:
    """The figures of the adjoint solve v = g + Jᵀv; all None until backward has run."""

    residual: Tensor | None = None
    steps: Tensor | None = None
    converged: Tensor | None = None
    trace: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """The solution of x = f(x, *args), one row per sample, and how well it was found.

    Attributes:
        value: the state, (batch, \\*state), or a tuple of such; it carries the gradient.
        residual: (batch,)  ‖f(x) − x‖₂ / (atol/rtol + ‖f(x)‖₂) of *this* value; inf where f is not finite, and 1 at
            least where the state has grown until its tolerance exceeds every step it took, and steps do not shorten.
        steps: (batch,) evaluations of f spent on the sample.
        converged: (batch,) whether ‖f(x) − x‖₂ ≤ atol + rtol ‖f(x)‖₂, that is, whether residual ≤ rtol.
        trace: (checks, batch) the residual at each check, NaN after a sample has finished; None unless asked for.
        backward: the same figures of the adjoint solve, filled when backward runs.
    """

    value: Tensor | tuple[Tensor, ...]
    residual: Tensor
    steps: Tensor
    converged: Tensor
    trace: Tensor | None = None
    backward: BackwardReport = field(default_factory=BackwardReport)

    def report(self) -> Report:
        """The figures without the value; those of the backward solve still arrive when it runs."""
        return Report(self.residual, self.steps, self.converged, self.trace, self.backward)


@dataclass(frozen=True)
class Report:
    """The figures of a `Solution`, which hold neither its value nor a graph."""

    residual: Tensor
    steps: Tensor
    converged: Tensor
    trace: Tensor | None
    backward: BackwardReport


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
        self.forward: list[tuple[Tensor, Tensor]] = []
        self.backward: list[tuple[Tensor, Tensor]] = []

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
        return sum(steps.numel() for steps, _ in self.forward)

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
        reports = self.forward + self.backward
        total = sum(converged.numel() for _, converged in reports)
        return sum(int((~converged).sum()) for _, converged in reports) / total if total else 0.0


def _mean_steps(reports: list[tuple[Tensor, Tensor]]) -> float:
    total = sum(steps.numel() for steps, _ in reports)
    return sum(int(steps.sum()) for steps, _ in reports) / total if total else float("nan")


# Not thread-local: autograd runs backward on threads of its own, and the adjoint's report belongs to the
# monitor that the training loop opened.
_open: list[Monitor] = []
_lock = threading.Lock()


def announce(
    who: str,
    direction: Literal["forward", "backward"],
    residual: Tensor,
    steps: Tensor,
    converged: Tensor,
    all_converged: bool,
    rtol: float,
    max_steps: int,
    on_failure: OnFailure,
) -> None:
    """Hand the figures to the open monitors and make a miss as loud as was asked for."""
    if _open:
        with _lock:
            for monitor in _open:
                getattr(monitor, direction).append((steps, converged))
    if all_converged or on_failure == "ignore":
        return
    missed, lost = int((~converged).sum()), int(torch.isinf(residual).sum())
    advice = "Raise max_steps, or check that the map is a contraction."
    if lost:
        advice = f"{lost} met NaN or infinity: look for them in the input and the weights. Or: {advice}"
    text = (
        f"{who}: {missed} of {converged.numel()} samples did not reach rtol={rtol:.0e} in {max_steps} steps "
        f"(worst residual {float(residual.max()):.1e}). {advice}"
    )
    if on_failure == "raise":
        raise ConvergenceError(text)
    # One worded line that names the solve is worth more here than a line number inside the library.
    warnings.warn(text, ImplicitFunctionWarning, stacklevel=2)


def check_on_failure(who: str, value: str) -> None:
    choice(who, "on_failure", value, ("raise", "warn", "ignore"))
