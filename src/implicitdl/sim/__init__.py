"""State-driven implicit models: an implicit model from a teacher's states, by convex optimisation."""

from .matching import SIMReport
from .path import PathPoint
from .score import score
from .solvers.base_solver import SIMWarning
from .state_driven import SIM
from .states import Layer, States, get_states, load_states

__all__ = ["SIM", "Layer", "PathPoint", "SIMReport", "SIMWarning", "States", "get_states", "load_states", "score"]
