"""Structured sets: strictly upper triangular, and low rank inside the ∞-norm ball."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._internal.context import plain
from .._internal.errors import positive_int, wrong
from .base import Constraint, norm_inf


class StrictlyUpper(Constraint):
    """Strictly upper triangular A: a feed-forward network, well posed for every φ and every size of A.

    Example:
        >>> import torch
        >>> from implicitdl.constraints import StrictlyUpper
        >>> StrictlyUpper()(torch.ones(2, 2))
        tensor([[0., 1.],
                [0., 0.]])
    """

    triangular = True

    def forward(self, raw: Tensor) -> Tensor:
        return raw.triu(1)

    def right_inverse(self, A: Tensor) -> Tensor:
        if not self.contains(A):
            raise wrong(
                "StrictlyUpper.right_inverse", "a strictly upper triangular A",
                f"{int((A.tril() != 0).sum())} nonzeros on or below the diagonal",
            )  # fmt: skip
        return A

    def contains(self, A: Tensor) -> bool:
        return not bool((A.tril() != 0).any())


class LowRank(Constraint):
    """A = LRᵀ of rank r with ‖A‖∞ ≤ κ / max|φ'|: row i of L is scaled by min(1, radius / ‖(LRᵀ)_i‖₁).

    The row norms are those of the product itself, not the bound ‖L‖∞‖Rᵀ‖∞, which would waste most of the ball;
    they are computed in blocks, so no n × n matrix is kept.

    Arguments:
        kappa, lipschitz: as for `Constraint`.
        rank: r, needed by `right_inverse` only.

    Example:
        >>> import torch
        >>> from implicitdl.constraints import LowRank
        >>> A = LowRank(kappa=0.5)(torch.ones(4, 1), torch.ones(4, 1))
        >>> A[0]
        tensor([0.1250, 0.1250, 0.1250, 0.1250])
    """

    def __init__(self, kappa: float = 0.99, lipschitz: float = 1.0, rank: int | None = None) -> None:
        super().__init__(kappa, lipschitz)
        self.rank = None if rank is None else positive_int("LowRank", "rank", rank)

    def factors(self, L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """(L', R), both (n, r), with L'Rᵀ in the set."""
        size = (_RowNorms.apply if plain() else _row_norms)(L, R).unsqueeze(1)
        if plain() and not bool((size > self.radius).any()):
            return L, R
        return L * (self.radius / size.clamp(min=self.radius)), R

    def forward(self, L: Tensor, R: Tensor) -> Tensor:  # type: ignore[override]
        L, R = self.factors(L, R)
        return L @ R.t()

    def right_inverse(self, A: Tensor) -> tuple[Tensor, Tensor]:
        if self.rank is None:
            raise wrong("LowRank.right_inverse", "a rank", None, "Build the constraint with LowRank(rank=r).")
        U, S, Vh = torch.linalg.svd(self._member(A), full_matrices=False)
        if float(S[self.rank :].sum()) > A.shape[0] * torch.finfo(A.dtype).eps * float(S[0]):
            raise wrong(
                "LowRank.right_inverse", f"A of rank at most {self.rank}", f"σ_{self.rank + 1} = {S[self.rank]:.3g}"
            )
        root = S[: self.rank].sqrt()
        return U[:, : self.rank] * root, Vh[: self.rank].t() * root

    def contains(self, A: Tensor) -> bool:
        # The product adds its own rounding of r terms to that of the row sum.
        return norm_inf(A) <= self.radius * (1 + 2 * A.shape[-1] * torch.finfo(A.dtype).eps)


# Entries of LRᵀ formed at a time: 16 MiB of float32.
_BLOCK_ENTRIES = 1 << 22


def _row_norms(L: Tensor, R: Tensor) -> Tensor:
    return torch.cat([(block @ R.t()).abs().sum(dim=1) for block in _blocks(L, R)])


class _RowNorms(torch.autograd.Function):
    """‖(LRᵀ)_i‖₁ for every row, in blocks of rows, forward and backward."""

    @staticmethod
    def forward(ctx: Any, L: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(L, R)
        return _row_norms(L, R)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        # d‖row‖₁ = sign(row)·d(row).  Written in differentiable operations: sign is constant almost everywhere.
        L, R = ctx.saved_tensors
        dL, dR = [], torch.zeros_like(R)
        for block, weight in zip(_blocks(L, R), _blocks(g.unsqueeze(1), R), strict=True):
            signs = (block.detach() @ R.detach().t()).sign()
            dL.append(weight * (signs @ R))
            dR = dR + signs.t() @ (weight * block)
        return torch.cat(dL), dR


def _blocks(rows: Tensor, R: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, _BLOCK_ENTRIES // R.shape[0]))
