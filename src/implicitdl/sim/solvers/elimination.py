"""The problem that is left for a when b is eliminated, and ADMM on it where λ is tiny."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import RowProblem
from .sweeps import sweep

# Of the Gram matrix, in trace: what is left below this share is rounding.
_NOTHING = 1e-12


class Elimination:
    """b = G_UU⁻¹(q_U − λσ − G_UX a): the minimiser for a given a, when σ are the signs of b.

    Attributes:
        gram: G_XX − G_XU G_UU⁻¹ G_UX, (n, n), of the problem that is left for a.
    """

    def __init__(self, problem: RowProblem) -> None:
        n, G = problem.n, problem.gram
        self._n, self._cross = n, G[:n, n:]
        # An input that is always zero has a b of zero.
        self._used = G.diagonal()[n:] > problem.ridge
        inputs = G[n:, n:].clone()
        inputs.diagonal().add_(problem.faces.shift)
        self._factor = torch.linalg.cholesky(inputs)
        self._K = torch.cholesky_solve(self._cross.t(), self._factor)
        self.gram = G[:n, :n] - self._cross @ self._K

    def b(self, q: Tensor, a: Tensor) -> Tensor:
        """(rows, p), from q = (q_X, q_U − λσ)."""
        return torch.cholesky_solve((q[:, self._n :] - a @ self._cross).t(), self._factor).t() * self._used

    def q(self, q: Tensor) -> Tensor:
        """(rows, n), the linear term for a: q_X − G_XU G_UU⁻¹(q_U − λσ)."""
        return q[:, : self._n] - q[:, self._n :] @ self._K


def eliminated(problem: RowProblem, rho: float | None, sweeps: int) -> tuple[Tensor, Tensor]:
    """ADMM on a after the elimination of b, for a λ too small to matter to most signs of b.

    What is left for a has a far better condition than the whole when the inputs are nearly rank-deficient, where
    ADMM on the whole crawls.  The signs of b are looked at again whenever ρ is balanced.

    Returns:
        w, (rows, d), and the share of b's entries that λ did not turn: near 1 where the premise holds, and 0 where the
        inputs explain the states and leave nothing for a.
    """
    n, q = problem.n, problem.correlation
    left = Elimination(problem)
    sign = left.b(q, torch.zeros_like(q[:, :n])).sign()

    def shifted(sign: Tensor) -> Tensor:
        return torch.cat([q[:, :n], q[:, n:] - problem.lam * sign], dim=1)

    def linear(a: Tensor) -> Tensor:
        nonlocal sign
        sign = left.b(shifted(sign), a).sign()
        return left.q(shifted(sign))

    if float(left.gram.trace()) <= _NOTHING * float(problem.gram.trace()):
        return torch.zeros_like(q), torch.zeros_like(q[:, 0])
    a = sweep(left.gram, linear, torch.zeros_like(q[:, :n]), n, problem.lam, problem.kappa, rho, sweeps)
    b = left.b(shifted(sign), a)
    kept = (b.sign() == left.b(q, a).sign()).double().mean(dim=1)
    return torch.cat([a, b], dim=1), kept
