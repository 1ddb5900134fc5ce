"""The picture of all weights of a model: the nonzero entries of one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .._internal.errors import extra, non_negative
from ..statespace import StateSpace
from ..statespace.matrices import count_nonzero, entries, starts
from ..statespace.space import Model, space_of
from .canvas import AMBER, BLUE, GREY, INK, PathLike, one_axes, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Cells a side: about the dots that a figure has.  In finer cells, entries of a large matrix would fall between dots.
_CELLS = 1000
# Inches of the matrix's longer side, and the share of it that the shorter one has at least: a 1:8 strip shows nothing.
_LONG, _SHORT = 6.4, 1 / 3
# Names of blocks that would be nearer to each other than this share of the height are left out.
_ROOM = 0.06


def spy(
    model: Model,
    *,
    magnitude: bool = False,
    threshold: float = 0.0,
    ax: Axes | None = None,
    path: PathLike | None = None,
) -> Figure:
    """The nonzero entries of [[C, D], [A, B]], all that a model is, with A after its constraint.

    Lines part the four matrices, and the blocks of states where a `StateSpace` has several: the layers of a network
    that it was converted from.

    Arguments:
        model: an `ImplicitModel`, or a `StateSpace`, dense or sparse.  C is (q, n), D (q, p), A (n, n) and B (n, p).
        magnitude: colour the entries by their absolute value, on a logarithmic scale, instead of black.
        threshold: entries of absolute value up to this one are left white, ≥ 0.
        ax: where to draw; a figure of its own by default.
        path: where to write the figure; the suffix (.png, .pdf, .svg) is the format.

    Returns:
        The figure.  Beyond 1,000 rows or columns a cell stands for several entries, and shows the largest.

    Raises:
        ArgumentError: another kind of model, a negative threshold, or a suffix that matplotlib does not write.
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the folder of `path` cannot be written.

    Example:
        >>> from implicitdl import ImplicitModel, viz
        >>> figure = viz.spy(ImplicitModel(input_dim=4, output_dim=2, hidden_dim=8))
        >>> figure.axes[0].get_title()
        'M = [[C, D], [A, B]]'
    """
    non_negative("spy", "threshold", threshold)
    space = space_of("spy", model)
    n, p, q = space.n, space.p, space.q
    M = _Cells(q + n, n + p)
    shares = {
        name: _words(part, M.add(part, top, left, threshold))
        for name, part, top, left in (
            ("C", space.C, 0, 0), ("D", space.D, 0, n), ("A", space.A, q, 0), ("B", space.B, q, n)
        )
    }  # fmt: skip
    ratio = min(max((q + n) / (n + p), _SHORT), 1 / _SHORT)
    width, height = _LONG * min(1.0, 1 / ratio), _LONG * min(1.0, ratio)
    figure, ax = one_axes(ax, (width + (1.7 if magnitude else 0.9), height + 1.7))  # and the words around it
    # The cells keep their shape where the sheet does.
    ax.set_aspect("equal" if ratio == (q + n) / (n + p) else "auto")
    _draw(ax, M, magnitude)
    _part(ax, space)
    for name, words in shares.items():
        _name(ax, f"{name}  {words}", (n / 2 if name in "CA" else n + p / 2, 0 if name in "CD" else q + n))
    ax.set_title("M = [[C, D], [A, B]]", color=INK, fontsize=11, pad=20)
    ax.tick_params(length=0, colors=INK)
    ax.tick_params(axis="x", pad=16)
    for spine in ax.spines.values():
        spine.set_color(GREY)
    return written(figure, path)


class _Cells:
    """The largest |entry| of a matrix in each cell of a grid that is no finer than a picture."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.largest = np.zeros((min(rows, _CELLS), min(columns, _CELLS)))

    def add(self, part: Tensor, top: int, left: int, threshold: float) -> int:
        """Put a matrix at this place, and count its entries above the threshold."""
        i, j, values = entries(part)
        sizes = values.abs().double().cpu().numpy()
        shown = sizes > threshold
        # Row r covers [r, r + 1] of the picture, and stands in the cell where its middle is.
        at = [
            ((2 * (index.cpu().numpy()[shown] + start) + 1) * cells) // (2 * size)
            for index, start, cells, size in (
                (i, top, self.largest.shape[0], self.rows), (j, left, self.largest.shape[1], self.columns)
            )
        ]  # fmt: skip
        np.maximum.at(self.largest, tuple(at), sizes[shown])
        return int(shown.sum())


def _draw(ax: Axes, M: _Cells, magnitude: bool) -> None:
    colors = extra("matplotlib.colors", "plots")
    extent = (0, M.columns, M.rows, 0)  # entry (i, j) covers [j, j+1] × [i, i+1]
    aspect = ax.get_aspect()
    if not magnitude:
        ink = colors.ListedColormap(["white", INK])
        ax.imshow(M.largest > 0, cmap=ink, vmin=0, vmax=1, aspect=aspect, extent=extent, interpolation="nearest")
        return
    shades = colors.LinearSegmentedColormap.from_list("entries", ["#dfe9f4", BLUE, INK]).with_extremes(bad="white")
    # Three decades: what is smaller does not change an answer in the printed digits.
    top = M.largest.max() or 1.0
    scale = colors.LogNorm(vmin=top / 1e3, vmax=top)
    shown = np.ma.masked_equal(M.largest, 0.0)
    image = ax.imshow(shown, cmap=shades, norm=scale, aspect=aspect, extent=extent, interpolation="nearest")
    # Beside the matrix itself, so that it is as high as that is drawn.
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.02, 0.0, 0.025, 1.0)), extend="min")
    bar.set_label("|entry|", color=INK)
    bar.outline.set_visible(False)


def _part(ax: Axes, space: StateSpace) -> None:
    """Lines between the matrices and between the blocks of states, and what is on either side."""
    n, p, q = space.n, space.p, space.q
    tops = starts(space.sizes)
    if len(tops) > 1:
        ax.hlines([q + top for top in tops[1:]], 0, n + p, color=AMBER, linewidth=0.6, linestyle="--")
        ax.vlines(tops[1:], 0, q + n, color=AMBER, linewidth=0.6, linestyle="--")
    ax.axhline(q, color=AMBER, linewidth=1.2)
    ax.axvline(n, color=AMBER, linewidth=1.2)
    ax.set_xticks(*_apart([(n / 2, f"state x\nn = {n}", n), (n + p / 2, f"input u\np = {p}", p)], 0))
    if len(tops) > 1:
        rows = [
            (q + top + size / 2, f"{phi.name}  {size}", size)
            for top, (phi, size) in zip(tops, space.blocks, strict=True)
        ]
        ax.set_yticks(*_apart([(q / 2, f"y  {q}", q), *rows], _ROOM * (q + n)))
    else:
        ax.set_yticks(*_apart([(q / 2, f"y\nq = {q}", q), (q + n / 2, f"x\nn = {n}", n)], 0))


def _apart(ticks: Sequence[tuple[float, str, int]], room: float) -> tuple[list[float], list[str]]:
    """Places and words of the ticks that stand for something, this far from each other."""
    places: list[float] = []
    names = []
    for at, words, size in ticks:
        if size and (not places or at - places[-1] >= room):
            places.append(at)
            names.append(words)
    return places, names


def _name(ax: Axes, words: str, at: tuple[float, float]) -> None:
    above = at[1] == 0
    ax.annotate(
        words, at, xytext=(0, 4 if above else -4), textcoords="offset points", ha="center",
        va="bottom" if above else "top", color=INK, fontsize=9, fontweight="bold", annotation_clip=False,
    )  # fmt: skip


def _words(part: Tensor, count: int) -> str:
    if count_nonzero(part) == 0:
        return "none"
    share = count / part.numel()
    if 0 < share < 0.001:
        return "<0.1% nonzero"
    return f"{share:.0%} nonzero" if share in (0, 1) else f"{share:.1%} nonzero"
