"""Constraint: forward, right inverse, membership."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.errors import open_unit, wrong


class Constraint(nn.Module, ABC):
    """A map from free parameters onto a set of matrices A for which x = φ(Ax + b) is well posed.

    It is a module without parameters, so that the same object serves inside `ImplicitModel` and in
    ``torch.nn.utils.parametrize.register_parametrization(module, "weight", constraint)``.  It is differentiable:
    gradients are those of the free parameters.

    Arguments:
        kappa: κ in (0, 1), the bound on the contraction factor.
        lipschitz: max |φ'|; the set is the one for which κ bounds the factor of φ(Ax + b).

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel
        >>> from implicitdl.constraints import Constraint
        >>> class Diagonal(Constraint):
        ...     def forward(self, raw):
        ...         return torch.diag(self.radius * torch.tanh(raw.diagonal()))
        ...     def right_inverse(self, A):
        ...         return torch.diag(torch.atanh(A.diagonal() / self.radius))
        ...     def contains(self, A):
        ...         return torch.equal(A, torch.diag(A.diagonal())) and bool((A.abs() <= self.radius).all())
        >>> ImplicitModel(4, 2, 8, constraint=Diagonal)(torch.randn(3, 4)).shape
        torch.Size([3, 2])
    """

    #: Whether members are strictly upper triangular, so that the equilibrium is one substitution.
    triangular = False
    #: Whether `forward` scales rows onto the ℓ1 ball, which a compiled solve may then do on its way.  Not inherited.
    scales_rows = False

    def __init__(self, kappa: float = 0.99, lipschitz: float = 1.0) -> None:
        super().__init__()
        self.kappa = open_unit(type(self).__name__, "kappa", kappa)
        if not 0.0 < lipschitz < float("inf"):
            raise wrong(
                type(self).__name__, "a φ with finite, nonzero max|φ'|", lipschitz,
                "An activation of unbounded slope has no ball of weights; use f=ImplicitFunctionTriu.",
            )  # fmt: skip
        self.lipschitz = float(lipschitz)

    @property
    def radius(self) -> float:
        """κ / max|φ'|: the largest ‖A‖∞ of a member, where the set is a ball of ‖·‖∞; of its own norm elsewhere."""
        return self.kappa / self.lipschitz

    @abstractmethod
    def forward(self, raw: Any) -> Tensor:
        """The member A that belongs to the free parameters."""

    @property
    def row_radius(self) -> float | None:
        """Radius of the ℓ1 ball, where a call scales rows onto it and does nothing else; None elsewhere."""
        # A subclass may make another matrix, and so may a hook.
        as_written = "scales_rows" in vars(type(self))
        hooked = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return self.kappa / self.lipschitz if as_written and not hooked else None

    @abstractmethod
    def right_inverse(self, A: Tensor) -> Any:
        """Free parameters whose image is A; an error when A is not a member."""

    @abstractmethod
    def contains(self, A: Tensor) -> bool:
        """Whether A is a member, up to rounding."""

    def extra_repr(self) -> str:
        return f"kappa={self.kappa}" + (f", lipschitz={self.lipschitz:.6g}" if self.lipschitz != 1.0 else "")

    def _member(self, A: Tensor) -> Tensor:
        if not self.contains(A):
            raise wrong(
                f"{type(self).__name__}.right_inverse", f"a member of the set (‖A‖∞ ≤ {self.radius:.6g})",
                f"‖A‖∞ = {norm_inf(A):.6g}",
                "Pass constraint(A), which is a member, but another matrix.",
            )  # fmt: skip
        return A

    def _in_ball(self, A: Tensor) -> bool:
        # n additions of rounded terms: n·eps relative.
        return norm_inf(A) <= self.radius * (1 + A.shape[-1] * torch.finfo(A.dtype).eps)


class Unconstrained(Constraint):
    """No constraint: A as it is.  Whether the equilibrium exists is up to the user, and the solve reports it."""

    def forward(self, raw: Tensor) -> Tensor:
        return raw

    def right_inverse(self, A: Tensor) -> Tensor:
        return A

    def contains(self, A: Tensor) -> bool:
        return True


def norm_inf(A: Tensor) -> float:
    """‖A‖∞, the largest absolute row sum."""
    return float(A.detach().abs().sum(dim=-1).max())
