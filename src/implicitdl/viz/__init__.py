"""Pictures of a model, of a solve and of a run: each function returns a matplotlib Figure and can write it."""

from .solves import quantiles, residuals, training_curves
from .weights import SpectralFigures, constrained, spectral_figures, spectrum, spy

__all__ = [
    "SpectralFigures",
    "constrained",
    "quantiles",
    "residuals",
    "spectral_figures",
    "spectrum",
    "spy",
    "training_curves",
]
