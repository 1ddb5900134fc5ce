"""What operator splitting needs of a map: y = prox_f(Wy + b) with I − W monotone, and its resolvent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .._internal.errors import finite


class MonotoneMap(Protocol):
    """A map x ↦ f(x) of rows in the form f(x) = prox(affine(inner(x)), 1).

    Its own variable is x, and the problem that splitting solves is stated in y = inner(x).  In an equilibrium they
    are the same; in an adjoint y = φ' ∘ x.  A map that has an ``activation`` which is not positively homogeneous
    offers its prox at alpha = 1 only.
    """

    b: Tensor

    def affine(self, y: Tensor) -> Tensor:
        """Wy + b."""

    def inner(self, x: Tensor) -> Tensor:
        """y of x."""

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        """The x whose y is (I + α∂f)⁻¹u."""

    def resolvent(self, alpha: float) -> Callable[[Tensor], Tensor]:
        """rhs ↦ (I + α(I − W))⁻¹ rhs."""

    def bounds(self) -> tuple[float, float]:
        """(m, L): I − W ⪰ mI and ‖I − W‖₂ ≤ L."""


def finite_weights(W: Tensor) -> Tensor:
    """W, where decompositions and inverses of it exist; NaN they only call a failure of their own."""
    finite("Splitting", "weights A", W, "Training has diverged: lower its rate, or go back to an earlier checkpoint.")
    return W


def resolvent(W: Tensor, alpha: float) -> Callable[[Tensor], Tensor]:
    """rhs ↦ (I + α(I − W))⁻¹ rhs for rows of right-hand sides, W dense; inverted once, at O(n³)."""
    # The eigenvalues of I + α(I − W) have real parts above 1: the inverse is as good as a factorisation, and a
    # product with it costs what a sweep costs.  LAPACK has no half precision.
    kept = finite_weights(W).to(torch.promote_types(W.dtype, torch.float32))
    shifted = (1 + alpha) * torch.eye(len(W), dtype=kept.dtype, device=W.device) - alpha * kept
    inverse = torch.linalg.inv(shifted).t().to(W.dtype)
    return lambda rhs: rhs @ inverse


def bounds(W: Tensor) -> tuple[float, float]:
    """(m, L) of a dense W: the smallest eigenvalue of the symmetric part of I − W, and ‖I − W‖₂."""
    kept = finite_weights(W).to(torch.promote_types(W.dtype, torch.float32))
    operator = torch.eye(len(W), dtype=kept.dtype, device=W.device) - kept
    m = torch.linalg.eigvalsh((operator + operator.t()) / 2).amin()
    return float(m), float(torch.linalg.matrix_norm(operator, 2))
