"""The figure that every picture is drawn on: colours, bare axes, and how it is written to a file.

Figures are made without pyplot, so that nothing here touches a program's own backend, style or open figures.
Colours mean the same in every picture: blue is training and the forward solve, amber is validation and bounds,
red is the backward solve.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .._internal import store
from .._internal.errors import extra, wrong

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, AMBER, RED, INK, GREY = "#2563a8", "#e08e1b", "#c0392b", "#22272e", "#8b949e"
_DPI = 150

PathLike = str | os.PathLike[str]


def new_figure(size: tuple[float, float]) -> Figure:
    figure: Figure = extra("matplotlib.figure", "plots").Figure(figsize=size, dpi=_DPI, layout="constrained")
    return figure


def one_axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if ax is None:
        figure = new_figure(size)
        return figure, figure.subplots()
    return ax.figure, ax  # type: ignore[return-value]


def plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=INK, labelsize=9)
    ax.title.set_color(INK)
    ax.title.set_fontsize(11)


def whole_numbers(ax: Axes) -> None:
    ax.xaxis.set_major_locator(extra("matplotlib.ticker", "plots").MaxNLocator(nbins="auto", integer=True))


def written(figure: Figure, path: PathLike | None) -> Figure:
    """Write the figure in one piece: a full disk leaves no half a picture."""
    if path is not None:
        path = Path(path)
        formats = figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in formats:
            raise wrong("viz", f"a path that ends in one of {', '.join(sorted(formats))}", f"'{path}'")
        data = io.BytesIO()
        figure.savefig(data, format=path.suffix[1:].lower(), dpi=_DPI)
        store.write_file(path, data.getvalue())
    return figure
