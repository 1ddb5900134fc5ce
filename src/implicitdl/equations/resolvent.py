"""The resolvent of a dense matrix and the bounds of its monotonicity, for operator splitting."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._internal.errors import finite


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
