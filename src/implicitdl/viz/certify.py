"""Pictures of what was proved: accuracy over the radius, and which pixels a model is sensitive to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .._internal.errors import wrong
from ..certify import CertifiedAccuracy, sensitivity
from ..statespace.space import Model
from .canvas import AMBER, BLUE, INK, RED, PathLike, new_figure, one_axes, plain, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def robust_accuracy(
    reports: Sequence[CertifiedAccuracy], *, ax: Axes | None = None, path: PathLike | None = None
) -> Figure:
    """Accuracy over ε: clean, under attack, and certified; the truth lies in the shaded band between the last two.

    Arguments:
        reports: of the same model and samples at different radii.
        ax: where to draw; a figure of its own by default.
        path: where to write the figure.

    Returns:
        The figure.

    Raises:
        ArgumentError: no reports; and as `spy`.

    Example:
        >>> from implicitdl import viz
        >>> from implicitdl.certify import CertifiedAccuracy
        >>> reports = [CertifiedAccuracy(eps, 100, 0.9, 0.9 - eps, 0.9 - 2 * eps, 0.0) for eps in (0.01, 0.05)]
        >>> viz.robust_accuracy(reports).axes[0].get_xlabel()
        'ε'
    """
    if not reports:
        raise wrong("robust_accuracy", "a report per radius", "none", "Call certify.certified_accuracy first.")
    figure, ax = one_axes(ax, (6.4, 4.4))
    reports = sorted(reports, key=lambda report: report.eps)
    eps = [report.eps for report in reports]
    curves = {name: [100 * getattr(report, name) for report in reports] for name in ("clean", "attacked", "certified")}
    for (name, values), colour in zip(curves.items(), (BLUE, RED, AMBER), strict=True):
        ax.plot(eps, values, color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
    ax.fill_between(eps, curves["certified"], curves["attacked"], color=AMBER, alpha=0.15, linewidth=0)
    ax.set(xlabel="ε", ylabel="accuracy (%)", ylim=(0, 100), title=f"Robust accuracy, {reports[0].samples:,} samples")
    plain(ax)
    ax.legend(frameon=False, fontsize=9)
    return written(figure, path)


def pixel_sensitivity(model: Model, shape: tuple[int, ...], *, path: PathLike | None = None) -> Figure:
    """How far a pixel can move each output at most, as images of the rows of the sensitivity matrix S.

    Arguments:
        model: whose equation contracts; its inputs are images.
        shape: of one image, (channels, height, width); channels are added up.
        path: where to write the figure.

    Returns:
        The figure, with a panel for each output, all on one scale.

    Raises:
        ArgumentError: a shape that has not p entries; as `certify.sensitivity`; and as `spy`.

    Example:
        >>> from implicitdl import ImplicitModel, viz
        >>> figure = viz.pixel_sensitivity(ImplicitModel(input_dim=12, output_dim=3, hidden_dim=5), (1, 3, 4))
        >>> [ax.get_title() for ax in figure.axes[:3]]
        ['output 0', 'output 1', 'output 2']
    """
    S = sensitivity(model)
    if len(shape) != 3 or torch.Size(shape).numel() != S.shape[1]:
        raise wrong("pixel_sensitivity", f"a (channels, height, width) of p={S.shape[1]} pixels", shape)
    images = S.view(-1, *shape).sum(1).cpu().numpy()
    columns = min(len(images), 5)
    rows = -(-len(images) // columns)
    figure = new_figure((1.9 * columns + 0.6, 2.0 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    for ax in panels.flat:
        ax.set_axis_off()
    for number, (ax, image) in enumerate(zip(panels.flat, images, strict=False)):
        shown = ax.imshow(image, cmap="magma", vmin=0, vmax=images.max())
        ax.set_title(f"output {number}", color=INK, fontsize=9)
    bar = figure.colorbar(shown, ax=panels, shrink=0.8)
    bar.set_label("largest change of the output per unit of the pixel", color=INK, fontsize=9)
    bar.outline.set_visible(False)
    return written(figure, path)
