"""Pictures of a solve and of a run: residual histories and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._internal.errors import wrong
from ..solution import Report, Solution
from .canvas import AMBER, BLUE, GREY, INK, RED, PathLike, new_figure, plain, whole_numbers, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def residuals(
    solution: Solution | Report | tuple[Tensor | None, Tensor | None],
    *,
    rtol: float | None = None,
    path: PathLike | None = None,
) -> Figure:
    """How the residual falls, step by step, in the forward and in the backward solve.

    The line is the median over the samples, the band holds 80 % of them; a sample that has ended counts with its
    last residual.

    Arguments:
        solution: of a solve with ``trace=True``, after backward has run; or its report, such as ``deq.stats``; or the
            two traces, each (steps, batch) or None.
        rtol: the tolerance to mark.
        path: where to write the figure.

    Returns:
        The figure, with a panel for each solve.

    Raises:
        ArgumentError: there is neither a forward nor a backward trace; and as `spy`.

    Example:
        >>> import torch
        >>> from implicitdl import fixed_point, viz
        >>> solution = fixed_point(torch.cos, torch.zeros(8, 1), trace=True)
        >>> len(viz.residuals(solution, rtol=1e-5).axes)
        2
    """
    forward, backward = solution if isinstance(solution, tuple) else (solution.trace, solution.backward.trace)
    if forward is None and backward is None:
        raise wrong("residuals", "a trace", "none", "Solve with trace=True.")
    figure = new_figure((9.6, 4.2))
    left, right = figure.subplots(1, 2, sharey=True)
    _history(left, "forward solve   x = f(x)", forward, rtol, BLUE)
    _history(right, "backward solve   v = g + Jᵀv", backward, rtol, RED)
    left.set_ylabel("relative residual  ‖f(x) − x‖ / ‖f(x)‖", color=INK)
    return written(figure, path)


def training_curves(
    rows: Sequence[Mapping[str, Any]], *, chosen: int | None = None, path: PathLike | None = None
) -> Figure:
    """Loss, accuracy, solver steps and the share of missed tolerances, epoch by epoch.

    Arguments:
        rows: ``logger.rows`` of `train`, or the lines of a run's metrics.jsonl; one per epoch.
        chosen: the epoch to mark; the one with the best validation accuracy (or loss) by default.
        path: where to write the figure.

    Returns:
        The figure, with a panel for each.

    Raises:
        ArgumentError: no rows; and as `spy`.

    Example:
        >>> from implicitdl import viz
        >>> rows = [{"epoch": e, "loss": 1 / e, "valid_loss": 1.1 / e} for e in (1, 2, 3)]
        >>> len(viz.training_curves(rows).axes)
        4
    """
    if not rows:
        raise wrong("training_curves", "a row per epoch", "none", "Train for an epoch first.")
    figure = new_figure((9.6, 6.4))
    panels = figure.subplots(2, 2, sharex=True)
    loss, accuracy, steps, missed = panels.flat
    epochs = [row.get("epoch", i) for i, row in enumerate(rows, start=1)]
    curves = (
        (loss, "loss", 1, (("loss", "training", BLUE), ("valid_loss", "validation", AMBER))),
        (accuracy, "accuracy (%)", 100, (("acc", "training", BLUE), ("valid_acc", "validation", AMBER))),
        (
            steps, "steps per sample", 1,
            (
                ("forward_steps", "forward", BLUE),
                ("backward_steps", "backward", RED),
                ("valid_steps", "forward, validation", AMBER),
            ),
        ),
        (
            missed, "missed the tolerance (%)", 100,
            (("missed", "training, both solves", BLUE), ("valid_missed", "validation", AMBER)),
        ),
    )  # fmt: skip
    marked = epochs[_best(rows)] if chosen is None else chosen
    for ax, title, unit, lines in curves:
        for key, label, colour in lines:
            values = [np.nan if row.get(key) is None else unit * float(row[key]) for row in rows]
            ax.plot(epochs, values, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=label)
        ax.axvline(marked, color=GREY, linewidth=1, linestyle=":", zorder=0)
        ax.set_ylabel(title, color=INK)
        plain(ax)
        ax.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        ax.legend(frameon=False, fontsize=9)
    for ax in (steps, missed):
        ax.set_ylim(0, 1.1 * max(ax.dataLim.y1, 1e-3))
    if not any(row.get("missed") or row.get("valid_missed") for row in rows):
        # A line along the axis is not seen, and matplotlib would scale it to meaningless digits.
        missed.set_ylim(0, 0.1)
        missed.text(0.5, 0.06, "none in any epoch", transform=missed.transAxes, ha="center", color=GREY, fontsize=9)
    for ax in (steps, missed):
        ax.set_xlabel("epoch", color=INK)
        whole_numbers(ax)
    accuracy.annotate(
        f"{'best epoch' if chosen is None else 'epoch'} {marked}", (marked, 0), xycoords=("data", "axes fraction"),
        xytext=(-4, 6), textcoords="offset points", ha="right", color=GREY, fontsize=9,
    )  # fmt: skip
    return written(figure, path)


def _best(rows: Sequence[Mapping[str, Any]]) -> int:
    """The row that `train` keeps as the best: the first with the largest accuracy, else the smallest loss."""
    if rows[0].get("valid_acc") is not None:
        return int(np.nanargmax([row["valid_acc"] for row in rows]))
    return int(np.nanargmin([row.get("valid_loss", np.nan) for row in rows])) if "valid_loss" in rows[0] else 0


def _history(ax: Axes, title: str, trace: Tensor | None, rtol: float | None, colour: str) -> None:
    ax.set_title(title, color=INK, fontsize=11)
    ax.set_xlabel("step", color=INK)
    ax.set_yscale("log")
    plain(ax)
    ax.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    if trace is None:
        ax.set_xticks([])
        ax.text(0.5, 0.5, "no trace of this solve", transform=ax.transAxes, ha="center", color=GREY)
        return
    steps, low, middle, high = quantiles(trace)
    ax.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0, label="10–90 % of samples")
    # A substitution is a single step, which a line would not show.
    ax.plot(
        steps, middle, color=colour, linewidth=2, marker="o" if len(steps) < 40 else "", markersize=3.5, label="median"
    )
    if rtol is not None:
        ax.axhline(rtol, color=INK, linewidth=1, linestyle="--", label=f"rtol = {rtol:.0e}")
    whole_numbers(ax)
    ax.legend(frameon=False, fontsize=9, loc="best")


def quantiles(trace: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps and the 10 %, 50 % and 90 % quantiles over the samples, ended ones held at their last residual.

    Arguments:
        trace: (steps, batch), NaN where a sample has none.

    Returns:
        ``(steps, low, median, high)``, each (steps,); steps count from 1.
    """
    held = trace.detach().double().cpu().numpy().copy()
    # A diverged sample has an infinite residual, which no axis shows: it stays at its last finite one.
    held[~np.isfinite(held)] = np.nan
    for step in range(1, len(held)):
        ended = np.isnan(held[step])
        held[step, ended] = held[step - 1, ended]
    there = ~np.isnan(held).all(axis=1)
    # 0 has no place on a logarithmic axis, and below the rounding of the solve there is nothing to see.
    held = np.maximum(held[there], torch.finfo(trace.dtype).eps)
    low, middle, high = np.nanquantile(held, [0.1, 0.5, 0.9], axis=1)
    return np.flatnonzero(there) + 1, low, middle, high
