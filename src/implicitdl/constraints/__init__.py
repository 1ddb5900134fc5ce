"""Sets of weights for which the equilibrium exists and is unique, as differentiable maps from free parameters."""

from .base import Constraint, Unconstrained, norm_inf
from .monotone import Monotone
from .monotone_conv import MonotoneKernel
from .norm import RowProjection, RowScaling, SoftRowScaling
from .normalize import SpectralNorm, WeightNorm
from .structure import LowRank, StrictlyUpper
from .weighted import WeightedRowScaling

__all__ = [
    "Constraint",
    "LowRank",
    "Monotone",
    "MonotoneKernel",
    "RowProjection",
    "RowScaling",
    "SoftRowScaling",
    "SpectralNorm",
    "StrictlyUpper",
    "Unconstrained",
    "WeightNorm",
    "WeightedRowScaling",
    "norm_inf",
]
