"""The ball of the weighted ∞-norm ‖A‖_{∞,v} = max_i Σ_j |a_ij| v_j / v_i: contractions of states in other units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..equations.scaling import row_scale
from .base import Constraint


class WeightedRowScaling(Constraint):
    """Σ_j |a_ij| v_j ≤ r v_i, r = κ / max|φ'|: rows outside are shrunk onto their bound, the others untouched.

    With S = diag(v) these are the A for which S⁻¹AS is in the ball of `RowScaling`: x ↦ φ(Ax + b) is a contraction of
    factor κ where x_i is measured in units of v_i.  The spectral radius of |A| is below r, while ‖A‖∞ may be anything.

    Arguments:
        kappa, lipschitz: as for `Constraint`.
        weights: v (n,), positive; None is the unweighted ball, until a state_dict with weights is loaded.

    Source: docs/theory.md §1.2.

    Example:
        >>> import torch
        >>> from implicitdl.constraints import WeightedRowScaling
        >>> A = torch.tensor([[0.0, 4.0], [0.1, 0.0]])
        >>> WeightedRowScaling(kappa=0.5, weights=torch.tensor([8.0, 1.0]))(A)
        tensor([[0.0000, 4.0000],
                [0.0625, 0.0000]])
    """

    weights: Tensor | None

    def __init__(self, kappa: float = 0.99, lipschitz: float = 1.0, weights: Tensor | None = None) -> None:
        super().__init__(kappa, lipschitz)
        if weights is not None:
            weights = _positive(weights.detach().clone())
        self.register_buffer("weights", weights)

    def forward(self, raw: Tensor) -> Tensor:
        return raw * row_scale(self._in_units(raw), self.radius)

    def right_inverse(self, A: Tensor) -> Tensor:
        if not self.contains(A):
            raise wrong(
                "WeightedRowScaling.right_inverse", f"a member of the set (Σ_j |a_ij| v_j / v_i ≤ {self.radius:.6g})",
                f"{float(self._in_units(A).abs().sum(dim=-1).max()):.6g}",
                "Pass constraint(A), which is a member, but another matrix.",
            )  # fmt: skip
        return A

    def contains(self, A: Tensor) -> bool:
        return self._in_ball(self._in_units(A))

    def _in_units(self, A: Tensor) -> Tensor:
        """S⁻¹AS."""
        return A if self.weights is None else A * self.weights / self.weights.unsqueeze(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A model that is read from a folder is built before its weights are known.
        saved = state_dict.get(prefix + "weights")
        if saved is not None:
            _positive(saved)
            self.weights = torch.empty_like(saved) if self.weights is None else self.weights
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _positive(weights: Tensor) -> Tensor:
    if weights.dim() != 1 or not bool((torch.isfinite(weights) & (weights > 0)).all()):
        raise wrong("WeightedRowScaling", "positive finite weights of shape (n,)", weights)
    return weights
