"""ProjectedGDLowRankSolver: A = LRᵀ by projected gradient descent on L and R."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._internal.errors import non_negative, positive, positive_int, settle, wrong
from ...constraints import RowScaling
from ..certificate import RowSolution, cast_inside, dual_gap
from ..problem import ActiveSetSystems, RowProblem
from .admm import Elimination
from .base_solver import Matrices, ModelConfig, RowSolver, SIMSolution, without_gap
from .distributed import Future

# Descent has ended when this many epochs lower the objective by less than the share tol.
_PATIENCE = 100


@dataclass(frozen=True, kw_only=True)
class ProjectedGDLowRankSolver(RowSolver):
    """A of rank r, for a low-rank `ImplicitModel` whose state is solved for in r dimensions.

        min ½‖Z − LRᵀX − BU‖² + ½λ(‖LRᵀ‖² + ‖B‖²)   subject to  ‖LRᵀ‖∞ ≤ κ

    B is eliminated, L and R start from the truncated singular values of the A of full rank, and Adam descends through
    the map that shrinks a row of LRᵀ that is too large, and so keeps its rank.  The problem is not convex: the
    objective is the best that was met, and no gap is known.  C and D are the certified ridge regression of the same λ.

    Arguments:
        rank: r, at most n; None for n.
        num_epoch: most steps.
        lambda_z: λ ≥ 0 of (A, B).
        lambda_y: λ ≥ 0 of (C, D).
        lr: learning rate of Adam.
        regen_states, tol: as for `RowSolver`; steps end when they bring less than the share tol.

    Example:
        >>> import torch
        >>> from implicitdl.sim.solvers import ProjectedGDLowRankSolver
        >>> X, U = torch.rand(4, 60), torch.rand(3, 60)
        >>> found = ProjectedGDLowRankSolver(rank=2).fit(X, U, 0.5 * X, X[:1])
        >>> [factor.shape for factor in found.factors], int(torch.linalg.matrix_rank(found.A))
        ([torch.Size([4, 2]), torch.Size([4, 2])], 2)
    """

    rank: int | None = None
    num_epoch: int = 10000
    lambda_z: float = 1e-6
    lambda_y: float = 1e-6
    lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive_int, "rank", "num_epoch")
        settle(self, positive, "lr")
        settle(self, non_negative, "lambda_z", "lambda_y")

    def penalties(self) -> tuple[tuple[float, float], tuple[float, float]]:
        return (0.0, self.lambda_z), (0.0, self.lambda_y)

    def fit(self, *states: Any, **options: Any) -> SIMSolution:
        found = super().fit(*states, **options)
        rank = self._rank(len(found.A))
        left, values, right = torch.linalg.svd(found.A)
        root = values[:rank].sqrt()
        return replace(found, factors=(left[:, :rank] * root, right[:rank].t() * root))

    def _check(self, states: Matrices, model_config: Any, intercept: bool) -> ModelConfig:
        config = super()._check(states, model_config, intercept)
        self._rank(len(states[0]))
        return config

    def _rank(self, n: int) -> int:
        if self.rank is not None and self.rank > n:
            raise wrong("ProjectedGDLowRankSolver", f"rank ≤ n={n}", self.rank)
        return self.rank or n

    def _hidden(self, problem: RowProblem, start: RowSolution | None, on_progress: Callable[[int], None]) -> Future:
        # R is shared by all rows, so there are no batches, and every process solves the same.
        left = Elimination(problem)
        q = left.q(problem.correlation)
        A = self._descended(left.gram, q, 0.5 * problem.target_square.sum(), problem.kappa)
        w = torch.cat([A, left.b(problem.correlation, A)], dim=1)
        on_progress(len(w))
        report, _ = dual_gap(problem, w, self.tol, move=False)
        return Future.of(RowSolution(A, w[:, problem.n :], without_gap(report)))

    def solve_rows(self, problem: RowProblem, start: RowSolution | None = None) -> RowSolution:
        w = problem.correlation @ problem.systems.inverse
        # Once more from the data: the inverse of a nearly singular Gram matrix has lost digits.
        w += problem.residual(w).gradient @ problem.systems.inverse
        return RowSolution(w[:, : problem.n], w[:, problem.n :], dual_gap(problem, w, self.tol)[0])

    def _descended(self, gram: Tensor, q: Tensor, constant: Tensor, kappa: float) -> Tensor:
        """The best feasible LRᵀ of a descent on ½⟨LRᵀG, LRᵀ⟩ − ⟨LRᵀ, q⟩."""
        rank = self._rank(len(gram))
        whole = q @ ActiveSetSystems(gram).inverse
        U, S, Vh = torch.linalg.svd(whole)
        L, R = (U[:, :rank] * S[:rank].sqrt()).requires_grad_(), (Vh[:rank].t() * S[:rank].sqrt()).requires_grad_()
        optimiser = torch.optim.Adam([L, R], lr=self.lr)
        ball = RowScaling(kappa)
        best, lowest, mark = torch.zeros_like(whole), math.inf, math.inf
        for epoch in range(self.num_epoch):
            A = ball(L @ R.t())
            objective = 0.5 * (A * (A @ gram)).sum() - (A * q).sum() + constant
            if (value := float(objective.detach())) < lowest:
                best, lowest = A.detach(), value
            if epoch % _PATIENCE == _PATIENCE - 1:
                if mark - lowest <= self.tol * abs(lowest):
                    break
                mark = lowest
            optimiser.zero_grad()
            objective.backward()
            optimiser.step()
        return cast_inside(best, best.dtype, kappa)
