"""An estimate of (I − J)⁻¹ that a quasi-Newton method leaves behind: the identity plus a matrix of low rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Rows


@dataclass(slots=True)
class InverseEstimate(Rows):
    """H = I + Σ_ij left_iᵀ core_ij right_j, one for every sample; H ≈ (I − J)⁻¹ where f was last linearised.

    Attributes:
        left, right: (batch, m, d).
        core: (batch, m, m).
    """

    left: Tensor
    right: Tensor
    core: Tensor

    def apply(self, r: Tensor) -> Tensor:
        """H r, (batch, d), in the dtype of r: the quasi-Newton step from a point of residual r."""
        return self._product(r, self.right, self.core, self.left)

    def transpose_apply(self, g: Tensor) -> Tensor:
        """Hᵀ g, (batch, d), in the dtype of g: an estimate of the adjoint v = g + Jᵀv that costs no product with J."""
        return self._product(g, self.left, self.core.transpose(1, 2), self.right)

    @staticmethod
    def _product(w: Tensor, into: Tensor, core: Tensor, out: Tensor) -> Tensor:
        along = torch.bmm(w.to(into.dtype).unsqueeze(1), into.transpose(1, 2))
        change = torch.bmm(torch.bmm(along, core.transpose(1, 2)), out).squeeze(1)
        return w + change.to(w.dtype)

    @staticmethod
    def merged(batch: int, parts: Iterable[tuple[Tensor, InverseEstimate]]) -> InverseEstimate:
        """One estimate for the whole batch from those of groups of rows; a later group overrides, no group is H = I."""
        whole: InverseEstimate | None = None
        for rows, part in parts:
            if whole is None:
                shapes = ((batch, *tensor.shape[1:]) for tensor in (part.left, part.right, part.core))
                whole = InverseEstimate(*(part.left.new_zeros(shape) for shape in shapes))
            whole.left[rows], whole.right[rows], whole.core[rows] = part.left, part.right, part.core
        assert whole is not None, "nothing to merge"
        return whole
