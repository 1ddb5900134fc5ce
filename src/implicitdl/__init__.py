"""implicitdl: models whose output is defined by an equation, x = φ(Ax + Bu), y = Cx + Du, or any x = f(x, u)."""

from . import activations, certify, constraints, data, sim, solvers, statespace, testing, viz
from ._internal.errors import ArgumentError
from ._internal.habits import unknown_name as _unknown_name
from ._internal.store import CheckpointError
from .activations import Activation
from .adjoints import SHINE, Adjoint, ImplicitAdjoint, PhantomGradient, Unrolled
from .data import cifar_load, mnist_load
from .equations.circular import CircularConvolution, CircularEquilibrium
from .equations.equilibrium import Equilibrium
from .equations.jacobian import SpectralRadius, jacobian_regularization, spectral_radius
from .equations.lowrank import LowRankEquilibrium
from .fixed_point import fixed_point, root
from .kernels.backend import Backend, backend
from .kernels.build import BackendWarning
from .nn import (
    DEQ,
    ImplicitFunction,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    ImplicitModel,
    ImplicitRNN,
    ImplicitRNNCell,
    compress,
)
from .sim import SIM
from .sim.solvers import ADMMMultiGPUSolver, ADMMSolver, CVXSolver, LeastSquareSolver, ProjectedGDLowRankSolver
from .solution import (
    BackwardReport,
    ConvergenceError,
    CoupledRowsWarning,
    ImplicitFunctionWarning,
    Monitor,
    Report,
    Solution,
    Status,
)
from .solvers import (
    GMRES,
    Aitken,
    Anderson,
    Auto,
    Broyden,
    ForwardBackward,
    Momentum,
    Newton,
    PeacemanRachford,
    Picard,
    Solver,
    Substitution,
)
from .statespace import StateSpace, prune
from .training import Logger, get_valid_accuracy, train

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    raise _unknown_name(name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__"])


__all__ = [
    "DEQ",
    "GMRES",
    "SHINE",
    "SIM",
    "ADMMMultiGPUSolver",
    "ADMMSolver",
    "Activation",
    "Adjoint",
    "Aitken",
    "Anderson",
    "ArgumentError",
    "Auto",
    "Backend",
    "BackendWarning",
    "BackwardReport",
    "Broyden",
    "CVXSolver",
    "CheckpointError",
    "CircularConvolution",
    "CircularEquilibrium",
    "ConvergenceError",
    "CoupledRowsWarning",
    "Equilibrium",
    "ForwardBackward",
    "ImplicitAdjoint",
    "ImplicitFunction",
    "ImplicitFunctionInf",
    "ImplicitFunctionTriu",
    "ImplicitFunctionWarning",
    "ImplicitModel",
    "ImplicitRNN",
    "ImplicitRNNCell",
    "LeastSquareSolver",
    "Logger",
    "LowRankEquilibrium",
    "Momentum",
    "Monitor",
    "Newton",
    "PeacemanRachford",
    "PhantomGradient",
    "Picard",
    "ProjectedGDLowRankSolver",
    "Report",
    "Solution",
    "Solver",
    "SpectralRadius",
    "StateSpace",
    "Status",
    "Substitution",
    "Unrolled",
    "__version__",
    "activations",
    "backend",
    "certify",
    "cifar_load",
    "compress",
    "constraints",
    "data",
    "fixed_point",
    "get_valid_accuracy",
    "jacobian_regularization",
    "mnist_load",
    "prune",
    "root",
    "sim",
    "solvers",
    "spectral_radius",
    "statespace",
    "testing",
    "train",
    "viz",
]
