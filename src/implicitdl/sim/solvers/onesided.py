"""OneSidedSolver: only φ(AX + BU) = X is asked for, so a state that is off may be off by any amount."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._internal.errors import positive_int, settle, wrong
from ...activations import RELU, Activation, from_function
from ..certificate import RowSolution, dual_gap
from ..problem import RowProblem
from .admm import ADMMSolver
from .base_solver import Matrices, ModelConfig

# After so many, the step is rounding.
_HALVINGS = 40


@dataclass(frozen=True, kw_only=True)
class OneSidedSolver(ADMMSolver):
    """State matching for ReLU that asks of Z only what X depends on.

        min ½ Σ_{z>0} (z − ẑ)² + ½ Σ_{z≤0} (ẑ)₊² + λ(‖a‖₁ + ‖b‖₁),   ẑ = Xᵀa + Uᵀb,   subject to  ‖a‖₁ ≤ κ

    Samples with z ≤ 0 and ẑ ≤ 0 are out of play.  Without them a row is the problem of `ADMMSolver` with z₊ for z;
    its solution decides anew who is in play, which is Newton's method on a piecewise quadratic objective, and ends
    when nobody changes.  A step that does not lower the objective is halved.

    The rows of (C, D) are those of `ADMMSolver`.

    Arguments:
        num_epoch: most Newton steps of a row.
        all others: as for `ADMMSolver`.

    Raises:
        ArgumentError: an activation other than ReLU, or intercepts, which centring takes out of squares only.

    Example:
        >>> import torch
        >>> from implicitdl.sim.solvers import OneSidedSolver
        >>> U = torch.rand(4, 50, dtype=torch.float64) - 0.5
        >>> Z = torch.tensor([[1.0, -1, 0, 2]], dtype=torch.float64) @ U
        >>> found = OneSidedSolver(lambda_z=1e-2, tol=1e-4).fit(Z.relu(), U, Z, Z.relu())
        >>> bool(found.hidden.converged.all())
        True
    """

    num_epoch: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive_int, "num_epoch")

    def _check(self, states: Matrices, model_config: Any, intercept: bool) -> ModelConfig:
        config = super()._check(states, model_config, intercept)
        phi = config["activation_fn"]
        activation = phi if isinstance(phi, Activation) else from_function(phi)
        if activation is not RELU or intercept:
            got = f"{activation.name}, intercept={intercept}"
            raise wrong("OneSidedSolver", "ReLU without intercepts", got, "Use ADMMSolver().")
        return config

    def solve_hidden(self, problem: RowProblem, start: RowSolution | None = None) -> RowSolution:
        w = self.solve_rows(problem.replace(T=problem.T.clamp(min=0))).w if start is None else start.w
        w = torch.cat([self._row(problem[row], w[row]) for row in torch.arange(len(w), device=w.device).split(1)])
        report, _ = dual_gap(_plain(problem, w), w, self.tol, move=False)
        return RowSolution(w[:, : problem.n], w[:, problem.n :], report)

    def _row(self, problem: RowProblem, w: Tensor) -> Tensor:
        z, before = problem.T[0], None
        for _ in range(self.num_epoch):
            play = (z > 0) | (problem.predicted(w)[0] > 0)
            if not bool(play.any()):
                return torch.zeros_like(w)
            if before is not None and bool((before == play).all()):
                break
            inside = RowProblem(
                X=problem.X[:, play], U=problem.U[:, play], T=z[None, play].clamp(min=0),
                lam=problem.lam, kappa=problem.kappa, ridge=problem.ridge,
            )  # fmt: skip
            w, before = _lower(problem, w, self.solve_rows(inside).w), play
        return w


def _plain(problem: RowProblem, w: Tensor) -> RowProblem:
    """The problem of squares with the same residual at w: its targets are z where z > 0 and min(ẑ, 0) elsewhere.

    The residual is ≤ 0 where z ≤ 0, as a dual point of the one-sided problem has to be, and shrinking keeps it so.
    """
    z = problem.T.double()
    return problem.replace(T=torch.where(z > 0, z, problem.predicted(w).clamp(max=0)))


def _lower(problem: RowProblem, w: Tensor, goal: Tensor) -> Tensor:
    """The first of goal, half the way to it, ... whose one-sided objective is not above that at w."""

    def objective(w: Tensor) -> Tensor:
        plain = _plain(problem, w)
        return plain.objective(w, plain.residual(w).square)

    here = objective(w)
    for halvings in range(_HALVINGS):
        if bool(objective(step := w + (goal - w) / 2**halvings) <= here):
            return step
    return w
