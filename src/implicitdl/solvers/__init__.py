"""The solver family: each is a frozen dataclass of its settings with `init` and `step`; the loop is iterate.py."""

from .aitken import Aitken
from .anderson import Anderson
from .auto import Auto
from .base import Solver
from .picard import Picard
from .substitution import Substitution

__all__ = ["Aitken", "Anderson", "Auto", "Picard", "Solver", "Substitution"]
