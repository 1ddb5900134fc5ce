"""implicitdl: models whose output is defined by an equation, x = φ(Ax + Bu), y = Cx + Du, or any x = f(x, u)."""

from .activations import Activation
from .adjoints import Adjoint, ImplicitAdjoint, PhantomGradient, Unrolled
from .equilibrium import Equilibrium, LowRankEquilibrium
from .fixed_point import fixed_point, root
from .nn import (
    ImplicitFunction,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    ImplicitModel,
    ImplicitRNN,
    ImplicitRNNCell,
)
from .solution import BackwardReport, ConvergenceError, ImplicitFunctionWarning, Monitor, Solution
from .solvers import Aitken, Anderson, Auto, Picard, Solver, Substitution

__all__ = [
    "Activation",
    "Adjoint",
    "Aitken",
    "Anderson",
    "Auto",
    "BackwardReport",
    "ConvergenceError",
    "Equilibrium",
    "ImplicitAdjoint",
    "ImplicitFunction",
    "ImplicitFunctionInf",
    "ImplicitFunctionTriu",
    "ImplicitFunctionWarning",
    "ImplicitModel",
    "ImplicitRNN",
    "ImplicitRNNCell",
    "LowRankEquilibrium",
    "Monitor",
    "PhantomGradient",
    "Picard",
    "Solution",
    "Solver",
    "Substitution",
    "Unrolled",
    "fixed_point",
    "root",
]
