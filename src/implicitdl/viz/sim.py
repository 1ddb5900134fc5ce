"""Pictures of a SIM: how well each row was solved, and accuracy against sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .._internal.errors import wrong
from ..sim import SIMReport
from .canvas import AMBER, BLUE, GREY, INK, RED, PathLike, new_figure, one_axes, plain, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Where a gap of zero is drawn: below what a sum over samples in float64 can tell.
_FLOOR = 1e-18
_COLOURS = (BLUE, AMBER, RED, INK)
_STYLES = ("-", "--", "-.", ":")
_ROUND = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def row_gaps(report: SIMReport, *, tol: float | None = None, path: PathLike | None = None) -> Figure:
    """The certificate of every row: its relative duality gap, for (A, B) and for (C, D).

    Arguments:
        report: of `SIM.train`.
        tol: the tolerance to mark.
        path: where to write the figure.

    Returns:
        The figure.  Rows without a bound are not drawn, and counted in the legend.

    Raises:
        As `spy`.

    Example:
        >>> import torch
        >>> from implicitdl import viz
        >>> from implicitdl.sim import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = SIM().train(model=teacher, dataloader=[torch.randn(64, 4)])
        >>> viz.row_gaps(report, tol=1e-6).axes[0].get_xlabel()
        'row'
    """
    figure = new_figure((8.0, 3.8))
    ax = figure.subplots()
    start = 0
    for rows, name, colour in ((report.hidden, "(A, B)", BLUE), (report.output, "(C, D)", AMBER)):
        gaps = rows.relative_gap.double().cpu().numpy()
        known = np.isfinite(gaps)
        label = name if known.all() else f"{name}, {int((~known).sum())} rows without a bound"
        at, shown = start + np.flatnonzero(known), np.maximum(gaps[known], _FLOOR)
        ax.scatter(at, shown, s=12, color=colour, linewidths=0, label=label)
        start += len(gaps)
    if tol is not None:
        ax.axhline(tol, color=INK, linewidth=1, linestyle="--", label=f"tol = {tol:.0e}")
    ax.set(yscale="log", xlabel="row", ylabel="relative duality gap")
    plain(ax)
    ax.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    ax.legend(frameon=False, fontsize=9)
    return written(figure, path)


def sparsity(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    reference: float | None = None,
    of: str = "",
    ax: Axes | None = None,
    path: PathLike | None = None,
) -> Figure:
    """Accuracy against the share of weights that are not zero, a curve for each way to get there.

    Arguments:
        curves: name to points (share, accuracy), both in [0, 1]; shares are of the teacher's nonzeros.
        reference: the teacher's accuracy, to mark.
        of: whose accuracy it is, such as "test" or "held-out"; the axis says it.
        ax: where to draw; a figure of its own by default.
        path: where to write the figure.

    Returns:
        The figure.

    Raises:
        ArgumentError: no points; and as `spy`.

    Example:
        >>> from implicitdl import viz
        >>> figure = viz.sparsity({"SIM": [(0.1, 0.8), (0.5, 0.85)]}, reference=0.86, of="test")
        >>> figure.axes[0].get_ylabel()
        'test accuracy (%)'
    """
    if not any(curves.values()):
        raise wrong("sparsity", "a curve with points", "none", "Solve a path first: SIM.path.")
    figure, ax = one_axes(ax, (6.4, 4.2))
    for i, (name, points) in enumerate(curves.items()):
        share, accuracy = 100 * np.array(sorted(points)).T
        ax.plot(
            share, accuracy, color=_COLOURS[i % 4], linestyle=_STYLES[i // 4 % 4], marker="o", markersize=4,
            linewidth=1.8, label=name,
        )  # fmt: skip
    if reference is not None:
        ax.axhline(100 * reference, color=GREY, linewidth=1, linestyle=":", label="teacher")
    ax.set(xscale="log", xlabel="nonzeros, % of the teacher's", ylabel=f"{of} accuracy (%)".lstrip())
    ticks = _ticks([100 * share for points in curves.values() for share, _ in points])
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    plain(ax)
    ax.grid(color=GREY, alpha=0.25, linewidth=0.6)
    # Below, where no curve can run through it.
    ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return written(figure, path)


def _ticks(shares: Sequence[float]) -> list[float]:
    """Round percentages around the points; the points themselves where fewer than two of those are near."""
    low, high = min(shares), max(shares)
    near = [tick for tick in _ROUND if 0.8 * low <= tick <= 1.25 * high]
    return near if len(near) > 1 else sorted({float(f"{low:.3g}"), float(f"{high:.3g}")})
