"""Solvers of state matching: each a frozen dataclass of its settings with `solve`, and `fit` with a report per row."""

from .admm import ADMMSolver
from .base_solver import BaseSolver, ModelConfig, PenalisedSolver, RowSolver
from .cvx import CVXSolver
from .leastsquares import LeastSquareSolver
from .lowrank import ProjectedGDLowRankSolver
from .multigpu import ADMMMultiGPUSolver
from .onesided import OneSidedSolver

__all__ = [
    "ADMMMultiGPUSolver",
    "ADMMSolver",
    "BaseSolver",
    "CVXSolver",
    "LeastSquareSolver",
    "ModelConfig",
    "OneSidedSolver",
    "PenalisedSolver",
    "ProjectedGDLowRankSolver",
    "RowSolver",
]
