"""State-driven implicit models: an implicit model from a teacher's states, by convex optimisation."""

from .path import PathPoint
from .report import SIMReport
from .score import score
from .sim import SIM
from .states import get_states
from .storage import Layer, States, load_states

__all__ = ["SIM", "Layer", "PathPoint", "SIMReport", "States", "get_states", "load_states", "score"]
