"""Sets of weights for which the equilibrium exists and is unique, as differentiable maps from free parameters."""

from .base import Constraint, Unconstrained, norm_inf
from .norm import RowProjection, RowScaling, SoftRowScaling
from .structure import LowRank, StrictlyUpper

__all__ = [
    "Constraint",
    "LowRank",
    "RowProjection",
    "RowScaling",
    "SoftRowScaling",
    "StrictlyUpper",
    "Unconstrained",
    "norm_inf",
]
