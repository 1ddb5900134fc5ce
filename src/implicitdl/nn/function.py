"""ImplicitFunction: φ, the constraint and the settings of a solve, chosen by subclassing as in earlier libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import activations
from ..activations import Activation
from ..constraints import Constraint, RowScaling, StrictlyUpper, Unconstrained


class ImplicitFunction:
    """What an `ImplicitModel` is made of; subclass it and override what should differ.  It is never instantiated.

    Attributes:
        mitr, grad_mitr: most steps of the forward and of the gradient solve.
        tol, grad_tol: their relative tolerances; None means the dtype's default (`Solver`).
        kappa: bound κ on the contraction factor.
        constraint: class of the constraint on A.  None here: A is used as it is.

    A subclass that overrides ``phi`` and not ``dphi`` gets φ' by autograd.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitFunctionInf, ImplicitModel
        >>> class Tanh(ImplicitFunctionInf):
        ...     tol = 1e-6
        ...     phi = staticmethod(torch.tanh)
        >>> ImplicitModel(input_dim=3, output_dim=1, hidden_dim=4, f=Tanh)(torch.zeros(2, 3)).shape
        torch.Size([2, 1])
    """

    mitr: int | None = None
    grad_mitr: int | None = None
    tol: float | None = None
    grad_tol: float | None = None
    kappa: float | None = None
    constraint: type[Constraint] = Unconstrained

    @staticmethod
    def phi(X: Tensor) -> Tensor:
        """φ, elementwise; ReLU unless overridden."""
        return torch.relu(X)

    @staticmethod
    def dphi(X: Tensor) -> Tensor:
        """φ', elementwise."""
        return (X > 0).to(X.dtype)

    @classmethod
    def activation(cls) -> Activation:
        """φ as a record: ReLU's own, torch's own where ``phi`` is one of its functions, else bounded numerically."""
        phi_owner, dphi_owner = _owner(cls, "phi"), _owner(cls, "dphi")
        if phi_owner is ImplicitFunction and dphi_owner is ImplicitFunction:
            return activations.RELU
        # A φ' defined further up than φ belongs to another φ.
        stale = cls.__mro__.index(phi_owner) < cls.__mro__.index(dphi_owner)
        return activations.from_function(cls.phi, None if stale else cls.dphi, name=cls.__qualname__)


class ImplicitFunctionInf(ImplicitFunction):
    """‖A‖∞ ≤ κ / max|φ'|: a unique equilibrium, found by plain iteration."""

    constraint = RowScaling


class ImplicitFunctionTriu(ImplicitFunction):
    """A strictly upper triangular: a feed-forward network, solved by one substitution."""

    constraint = StrictlyUpper


def _owner(cls: type, name: str) -> Any:
    return next(c for c in cls.__mro__ if name in vars(c))
