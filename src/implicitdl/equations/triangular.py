"""Substitution: the solution of an equilibrium whose matrix is strictly triangular, in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Columns of x settled before the rest is updated by one matrix product: large enough that the products dominate,
# small enough that the rank-one updates inside a block stay in cache.
_BLOCK = 32


def substitute(M: Tensor, b: Tensor, phi: Callable[[Tensor, int], Tensor], *, backwards: bool) -> Tensor:
    """Solve x_i = φ_i(b_i + Σ_j x_j M_ji), M strictly triangular, column by column.

    With ``backwards`` M is strictly lower triangular (column i needs the later ones), otherwise strictly upper.
    """
    n = M.shape[0]
    x = torch.empty_like(b)
    starts = range(0, n, _BLOCK)
    for start in reversed(starts) if backwards else starts:
        stop = min(start + _BLOCK, n)
        settled = slice(stop, n) if backwards else slice(0, start)
        z = torch.addmm(b[:, start:stop], x[:, settled], M[settled, start:stop])
        columns = range(stop - 1, start - 1, -1) if backwards else range(start, stop)
        for i in columns:
            x[:, i] = phi(z[:, i - start], i)
            open_ = slice(start, i) if backwards else slice(i + 1, stop)
            z[:, open_.start - start : open_.stop - start].addr_(x[:, i], M[i, open_])
    return x
