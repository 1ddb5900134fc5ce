"""How large A is: its norms, its eigenvalues, and their picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..constraints import Monotone, Unconstrained
from ..nn import ImplicitModel
from .canvas import AMBER, BLUE, GREY, RED, PathLike, one_axes, plain, written

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
