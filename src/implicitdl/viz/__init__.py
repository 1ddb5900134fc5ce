"""Pictures of a model, of a solve and of a run: each function returns a matplotlib Figure and can write it."""

from .certify import pixel_sensitivity, robust_accuracy
from .pattern import spy
from .sim import row_gaps, sparsity
from .solves import quantiles, residuals, training_curves
from .weights import SpectralFigures, constrained, spectral_figures, spectrum

__all__ = [
    "SpectralFigures",
    "constrained",
    "pixel_sensitivity",
    "quantiles",
    "residuals",
    "robust_accuracy",
    "row_gaps",
    "sparsity",
    "spectral_figures",
    "spectrum",
    "spy",
    "training_curves",
]
