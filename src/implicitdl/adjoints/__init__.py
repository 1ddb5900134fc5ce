"""How the gradient gets through a solution: exactly, by a few steps, or through the iterations."""

from .base import Adjoint
from .implicit import ImplicitAdjoint
from .phantom import PhantomGradient
from .shine import SHINE
from .unrolled import Unrolled

__all__ = ["SHINE", "Adjoint", "ImplicitAdjoint", "PhantomGradient", "Unrolled"]
