"""implicitdl: models whose output is defined by an equation, x = φ(Ax + Bu), y = Cx + Du, or any x = f(x, u)."""

from . import activations, constraints, data, solvers, viz
from .activations import Activation
from .adjoints import Adjoint, ImplicitAdjoint, PhantomGradient, Unrolled
from .data import cifar_load, mnist_load
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
from .training import Logger, get_valid_accuracy, train

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
    "Logger",
    "LowRankEquilibrium",
    "Monitor",
    "PhantomGradient",
    "Picard",
    "Solution",
    "Solver",
    "Substitution",
    "Unrolled",
    "activations",
    "cifar_load",
    "constraints",
    "data",
    "fixed_point",
    "get_valid_accuracy",
    "mnist_load",
    "root",
    "solvers",
    "train",
    "viz",
]
