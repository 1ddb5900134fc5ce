"""Pictures of a model: its matrix and its spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import extra, non_negative
from ..constraints import Monotone, Unconstrained
from ..nn import ImplicitModel
from .canvas import AMBER, BLUE, GREY, INK, RED, PathLike, one_axes, plain, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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

    figure, ax = one_axes(ax, (8.0, 5.4))
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
    return written(figure, path)


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
    figure, ax = one_axes(ax, (6.2, 6.2))
    turn = np.linspace(0, 2 * np.pi, 361)
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.5, zorder=0)
    ax.plot(np.cos(turn), np.sin(turn), color=GREY, linewidth=1, linestyle="--", label="unit circle")
    if isinstance(model.constraint, Monotone):
        ax.axvline(bound, color=AMBER, linewidth=1.6, label=f"Re λ ≤ 1 − m = {bound:.4g}")
    elif not model.constraint.triangular and not isinstance(model.constraint, Unconstrained):
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
    plain(ax)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False, fontsize=9)
    return written(figure, path)


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
