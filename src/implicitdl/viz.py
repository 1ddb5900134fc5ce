"""Pictures of a model, of a solve and of a run: each function returns a matplotlib Figure and can write it.

Figures are made without pyplot, so that nothing here touches a program's own backend, style or open figures.
Colours mean the same in every picture: blue is training and the forward solve, amber is validation and bounds,
red is the backward solve.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _store
from ._checks import extra, non_negative, wrong
from .constraints import Unconstrained
from .nn import ImplicitModel
from .solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, AMBER, RED, INK, GREY = "#2563a8", "#e08e1b", "#c0392b", "#22272e", "#8b949e"
_DPI = 150

PathLike = str | os.PathLike[str]


class SpectralFigures(NamedTuple):
    """How large A is, in the measures that decide how fast x = φ(Ax + b) is solved.

    Attributes:
        norm: ‖A‖∞, the largest absolute row sum.
        perron_low, perron_high: bounds of λ_pf(|A|), the Perron eigenvalue of the absolute values.
        radius: ρ(A), the largest absolute eigenvalue.
        eigenvalues: (n,) complex.
    """

    norm: float
    perron_low: float
    perron_high: float
    radius: float
    eigenvalues: np.ndarray

    @property
    def perron(self) -> float:
        """λ_pf(|A|), the middle of its bounds."""
        return (self.perron_low + self.perron_high) / 2


def constrained(model: ImplicitModel) -> np.ndarray:
    """A as the model uses it, the constraint applied and LRᵀ formed, (n, n) float64."""
    with torch.no_grad():
        weights = model.weights()
    A = weights[0] if len(weights) == 1 else weights[0] @ weights[1].t()
    return _array(A)


def spectral_figures(A: np.ndarray) -> SpectralFigures:
    """‖A‖∞, λ_pf(|A|) and ρ(A), for which ρ(A) ≤ λ_pf(|A|) ≤ ‖A‖∞.

    Arguments:
        A: (n, n).

    Returns:
        The `SpectralFigures`.

    Source: the Collatz–Wielandt bounds min_i (|A|x)_i/x_i ≤ λ_pf(|A|) ≤ max_i (|A|x)_i/x_i, which hold for
        every x > 0; the x is from power iteration.

    Example:
        >>> import numpy as np
        >>> found = spectral_figures(np.array([[0.0, -0.5], [0.5, 0.0]]))
        >>> found.norm, round(found.perron, 6), round(found.radius, 6)
        (0.5, 0.5, 0.5)
    """
    eigenvalues = np.linalg.eigvals(A)
    low, high = _perron(np.abs(A))
    norm = float(np.abs(A).sum(axis=1).max())
    return SpectralFigures(norm, low, high, float(np.abs(eigenvalues).max()), eigenvalues)


def spy(
    model: ImplicitModel,
    *,
    magnitude: bool = False,
    threshold: float = 0.0,
    ax: Axes | None = None,
    path: PathLike | None = None,
) -> Figure:
    """The nonzero entries of [[C, D], [A, B]], all that a model is, with A after its constraint.

    Arguments:
        model: its blocks are C (q, n), D (q, p), A (n, n) and B (n, p); without D that block is empty.
        magnitude: colour the entries by their absolute value, on a logarithmic scale, instead of black.
        threshold: entries of absolute value up to this one are left white, ≥ 0.
        ax: where to draw; a figure of its own by default.
        path: where to write the figure; the suffix (.png, .pdf, .svg) is the format.

    Returns:
        The figure.

    Raises:
        ArgumentError: a negative threshold, or a suffix that matplotlib does not write.
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the folder of `path` cannot be written.

    Example:
        >>> from implicitdl import ImplicitModel, viz
        >>> figure = viz.spy(ImplicitModel(input_dim=4, output_dim=2, hidden_dim=8))
        >>> figure.axes[0].get_title()
        'M = [[C, D], [A, B]]'
    """
    non_negative("spy", "threshold", threshold)
    n, p, q = model.hidden_dim, model.input_dim, model.output_dim
    M = np.zeros((q + n, n + p))
    blocks = {
        "C": (slice(0, q), slice(0, n), _array(model.C)),
        "D": (slice(0, q), slice(n, n + p), None if model.D is None else _array(model.D)),
        "A": (slice(q, q + n), slice(0, n), constrained(model)),
        "B": (slice(q, q + n), slice(n, n + p), _array(model.B)),
    }
    for rows, columns, block in blocks.values():
        if block is not None:
            M[rows, columns] = np.abs(block)
    M[threshold >= M] = 0.0

    figure, ax = _one(ax, (8.0, 5.4))
    # Entries keep their shape where the sheet does; a 1:8 strip would show nothing.
    aspect: Literal["equal", "auto"] = "equal" if 1 / 3 < (n + q) / (n + p) < 3 else "auto"
    if magnitude:
        colors = extra("matplotlib.colors", "plots")
        shades = colors.LinearSegmentedColormap.from_list("entries", ["#dfe9f4", BLUE, INK])
        # Three decades: what is smaller does not change an answer in the printed digits.
        largest = M.max() or 1.0
        scale = colors.LogNorm(vmin=largest / 1e3, vmax=largest)
        image = ax.imshow(
            np.ma.masked_equal(M, 0.0),
            cmap=shades.with_extremes(bad="white"),
            norm=scale,
            aspect=aspect,
            extent=_extent(M),
        )
        bar = figure.colorbar(image, ax=ax, pad=0.02, extend="min")
        bar.set_label("|entry|", color=INK)
        bar.outline.set_visible(False)
    else:
        ink = extra("matplotlib.colors", "plots").ListedColormap(["white", INK])
        ax.imshow(M > 0, cmap=ink, vmin=0, vmax=1, aspect=aspect, extent=_extent(M))
    ax.axhline(q, color=AMBER, linewidth=1.2)
    ax.axvline(n, color=AMBER, linewidth=1.2)
    ax.set_xticks([n / 2, n + p / 2], [f"state x\nn = {n}", f"input u\np = {p}"])
    ax.set_yticks([q / 2, q + n / 2], [f"y\nq = {q}", f"x\nn = {n}"])
    ax.tick_params(length=0, colors=INK)
    for name, (rows, columns, block) in blocks.items():
        words = f"{name}  none" if block is None else f"{name}  {_percent(M[rows, columns])} nonzero"
        above = name in "CD"
        ax.annotate(
            words,
            ((columns.start + columns.stop) / 2, 0 if above else q + n),
            xytext=(0, 4 if above else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            color=INK,
            fontsize=9,
            fontweight="bold",
            annotation_clip=False,
        )
    ax.tick_params(axis="x", pad=16)
    ax.set_title("M = [[C, D], [A, B]]", color=INK, fontsize=11, pad=20)
    for spine in ax.spines.values():
        spine.set_color(GREY)
    return _written(figure, path)


def spectrum(model: ImplicitModel, *, ax: Axes | None = None, path: PathLike | None = None) -> Figure:
    """The eigenvalues of the constrained A in the complex plane, with the bound that keeps it well posed.

    Arguments:
        model: whose A = LRᵀ or A is drawn after its constraint.
        ax: where to draw; a figure of its own by default.
        path: where to write the figure.

    Returns:
        The figure; its legend has ρ(A), λ_pf(|A|) and ‖A‖∞.

    Raises:
        As `spy`.

    Example:
        >>> from implicitdl import ImplicitModel, viz
        >>> figure = viz.spectrum(ImplicitModel(input_dim=4, output_dim=2, hidden_dim=8))
        >>> figure.axes[0].get_xlabel()
        'Re λ'
    """
    found = spectral_figures(constrained(model))
    bound = model.constraint.radius
    slope = model.constraint.lipschitz
    figure, ax = _one(ax, (6.2, 6.2))
    turn = np.linspace(0, 2 * np.pi, 361)
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.5, zorder=0)
    ax.plot(np.cos(turn), np.sin(turn), color=GREY, linewidth=1, linestyle="--", label="unit circle")
    if not model.constraint.triangular and not isinstance(model.constraint, Unconstrained):
        name = "κ" if slope == 1.0 else "κ / max|φ'|"
        ax.plot(bound * np.cos(turn), bound * np.sin(turn), color=AMBER, linewidth=1.6, label=f"{name} = {bound:.4g}")
    ax.scatter(
        found.eigenvalues.real, found.eigenvalues.imag, s=16, color=BLUE, alpha=0.75, linewidths=0, zorder=3,
        label=f"eigenvalues, ρ(A) = {found.radius:.4f}",
    )  # fmt: skip
    ax.plot(
        [found.perron], [0], marker="D", markersize=7, color=RED, linestyle="none", zorder=4,
        label=rf"$\lambda_{{pf}}(|A|)$ = {found.perron:.4f}",
    )  # fmt: skip
    ax.plot([], [], linestyle="none", label=rf"$\|A\|_\infty$ = {found.norm:.4f}")
    reach = 1.08 * max(1.0, found.perron, found.radius)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.set(xlabel="Re λ", ylabel="Im λ", title=f"Spectrum of A  (n = {model.hidden_dim})")
    _plain(ax)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False, fontsize=9)
    return _written(figure, path)


def residuals(
    solution: Solution | tuple[Tensor | None, Tensor | None],
    *,
    rtol: float | None = None,
    path: PathLike | None = None,
) -> Figure:
    """How the residual falls, step by step, in the forward and in the backward solve.

    The line is the median over the samples, the band holds 80 % of them; a sample that has ended counts with its
    last residual.

    Arguments:
        solution: of a solve with ``trace=True``, after backward has run; or the two traces, each (steps, batch)
            or None.
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
    forward, backward = (solution.trace, solution.backward.trace) if isinstance(solution, Solution) else solution
    if forward is None and backward is None:
        raise wrong("residuals", "a trace", "none", "Solve with trace=True.")
    figure = _figure((9.6, 4.2))
    left, right = figure.subplots(1, 2, sharey=True)
    _history(left, "forward solve   x = f(x)", forward, rtol, BLUE)
    _history(right, "backward solve   v = g + Jᵀv", backward, rtol, RED)
    left.set_ylabel("relative residual  ‖f(x) − x‖ / ‖f(x)‖", color=INK)
    return _written(figure, path)


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
    figure = _figure((9.6, 6.4))
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
        _plain(ax)
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
        _whole_numbers(ax)
    accuracy.annotate(
        f"{'best epoch' if chosen is None else 'epoch'} {marked}", (marked, 0), xycoords=("data", "axes fraction"),
        xytext=(-4, 6), textcoords="offset points", ha="right", color=GREY, fontsize=9,
    )  # fmt: skip
    return _written(figure, path)


def _best(rows: Sequence[Mapping[str, Any]]) -> int:
    """The row that `train` keeps as the best: the first with the largest accuracy, else the smallest loss."""
    if rows[0].get("valid_acc") is not None:
        return int(np.nanargmax([row["valid_acc"] for row in rows]))
    return int(np.nanargmin([row.get("valid_loss", np.nan) for row in rows])) if "valid_loss" in rows[0] else 0


def _history(ax: Axes, title: str, trace: Tensor | None, rtol: float | None, colour: str) -> None:
    ax.set_title(title, color=INK, fontsize=11)
    ax.set_xlabel("step", color=INK)
    ax.set_yscale("log")
    _plain(ax)
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
    _whole_numbers(ax)
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


def _perron(M: np.ndarray) -> tuple[float, float]:
    """Bounds of the Perron eigenvalue of a nonnegative matrix."""
    if not np.tril(M).any() or not np.triu(M).any():
        return 0.0, 0.0  # strictly triangular: nilpotent
    x = np.ones(len(M))
    low, high = 0.0, np.inf
    for _ in range(1000):
        y = M @ x
        ratio = y / x
        low, high = max(low, float(ratio.min())), min(high, float(ratio.max()))
        if high - low <= 1e-6 * high:
            break
        # Half a step of x keeps M with a periodic pattern from cycling; the floor keeps x > 0, for which both
        # bounds hold, where M is reducible.
        x = 0.5 * (x + y / y.max())
        x = np.maximum(x / x.max(), 1e-12)
    return low, high


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().double().cpu().numpy()
    return array


def _percent(block: np.ndarray) -> str:
    share = np.count_nonzero(block) / block.size
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def _extent(M: np.ndarray) -> tuple[float, float, float, float]:
    return 0, M.shape[1], M.shape[0], 0  # entry (i, j) covers [j, j+1] × [i, i+1]


def _figure(size: tuple[float, float]) -> Figure:
    figure: Figure = extra("matplotlib.figure", "plots").Figure(figsize=size, dpi=_DPI, layout="constrained")
    return figure


def _one(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if ax is None:
        figure = _figure(size)
        return figure, figure.subplots()
    return ax.figure, ax  # type: ignore[return-value]


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=INK, labelsize=9)
    ax.title.set_color(INK)
    ax.title.set_fontsize(11)


def _whole_numbers(ax: Axes) -> None:
    ax.xaxis.set_major_locator(extra("matplotlib.ticker", "plots").MaxNLocator(nbins="auto", integer=True))


def _written(figure: Figure, path: PathLike | None) -> Figure:
    """Write the figure in one piece: a full disk leaves no half a picture."""
    if path is not None:
        path = Path(path)
        formats = figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in formats:
            raise wrong("viz", f"a path that ends in one of {', '.join(sorted(formats))}", f"'{path}'")
        data = io.BytesIO()
        figure.savefig(data, format=path.suffix[1:].lower(), dpi=_DPI)
        _store.write_file(path, data.getvalue())
    return figure
