"""The solvers: each is a frozen dataclass of its settings with `init` and `step`; the loop is `loop.iterate`."""

from .aitken import Aitken
from .anderson import Anderson
from .auto import Auto
from .base import Solver
from .broyden import Broyden
from .gmres import GMRES
from .momentum import Momentum
from .newton import Newton
from .picard import Picard
from .splitting import ForwardBackward, PeacemanRachford
from .state import InverseEstimate
from .substitution import Substitution

__all__ = [
    "GMRES",
    "Aitken",
    "Anderson",
    "Auto",
    "Broyden",
    "ForwardBackward",
    "InverseEstimate",
    "Momentum",
    "Newton",
    "PeacemanRachford",
    "Picard",
    "Solver",
    "Substitution",
]
