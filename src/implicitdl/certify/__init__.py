"""Certification: what can be proved about a model, how close attacks come to it, and training for it."""

from .accuracy import AttackedAccuracy, CertifiedAccuracy, attacked_accuracy, certified_accuracy
from .attack import pgd
from .bounds import Margins, margins, output_bounds
from .domain import Box
from .lipschitz import lipschitz_inf, lipschitz_sdp, lipschitz_two
from .loss import CertifiedLoss
from .methods import Crown, Interval, Method, Sensitivity
from .normal import Contractive, contractive
from .p_matrix import p_matrix
from .sensitivity import sensitivity
from .well_posed import Condition, WellPosedness, well_posed

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
