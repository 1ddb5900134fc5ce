"""Certification: what can be proved about a model, how close attacks come to it, and training for it."""

from .accuracy import AttackedAccuracy, CertifiedAccuracy, attacked_accuracy, certified_accuracy, pgd
from .bounds import Margins, margins, output_bounds
from .contraction import Contractive, Method, Sensitivity, contractive, sensitivity
from .crown import Crown
from .functionals import Box
from .interval import Interval
from .lipschitz import lipschitz_inf, lipschitz_sdp, lipschitz_two
from .loss import CertifiedLoss
from .well_posed import Condition, WellPosedness, p_matrix, well_posed

__all__ = [
    "AttackedAccuracy",
    "Box",
    "CertifiedAccuracy",
    "CertifiedLoss",
    "Condition",
    "Contractive",
    "Crown",
    "Interval",
    "Margins",
    "Method",
    "Sensitivity",
    "WellPosedness",
    "attacked_accuracy",
    "certified_accuracy",
    "contractive",
    "lipschitz_inf",
    "lipschitz_sdp",
    "lipschitz_two",
    "margins",
    "output_bounds",
    "p_matrix",
    "pgd",
    "sensitivity",
    "well_posed",
]
