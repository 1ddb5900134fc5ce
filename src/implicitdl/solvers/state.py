"""States of methods, one row a sample; among them the estimate of (I − J)⁻¹ of a quasi-Newton method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(slots=True)
class Rows:
    """A state made of tensors (batch, ...), and of such states."""

    def take(self, rows: Tensor) -> Self:
        parts = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Tensor):
                value = value.index_select(0, rows)
            parts[part.name] = value.take(rows) if isinstance(value, Rows) else value
        return type(self)(**parts)


def precise(dtype: torch.dtype) -> torch.dtype:
    """Where a method keeps differences and scalar products: half precision has too few digits for either."""
    return torch.promote_types(dtype, torch.float32)


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
