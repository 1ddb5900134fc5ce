"""A few steps at the solution, differentiated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import positive_int, settle
from ..equations.map import Map
from ..loop.iterate import SolveResult, iterate
from ..solution import BackwardReport, OnFailure
from ..solvers import Solver
from ..solvers.base import damping
from .base import Adjoint


@dataclass(frozen=True, kw_only=True)
class PhantomGradient(Adjoint):
    """An approximate gradient: that of a few damped steps taken at the solution.  Cheap, and biased.

    One step is the Jacobian-free backpropagation (JFB) of Wu Fung et al.

    Bias: the adjoint's Neumann series is cut after ``steps`` terms, so the error decays like ‖J‖^steps.  Cost: so
    many evaluations of f, whose graphs are kept, and a product with Jᵀ for each but one.

    Arguments:
        steps: how many steps at the solution are differentiated; their activations are kept.
        damping: τ in x ← (1 − τ) x + τ f(x).

    Source: Geng et al., On Training Implicit Models (2021), eq. (9); Wu Fung et al., JFB (2021).
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        settle(self, positive_int, "steps")
        settle(self, damping, "damping")

    def solve(
        self, f: Map, x0: Tensor | None, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> SolveResult:
        result = iterate(f, x0, solver, trace=trace)
        if not torch.is_grad_enabled():
            return result
        x = result.x.detach()
        for _ in range(self.steps):
            fx = x + f(x) if f.root else f(x)
            x = fx if self.damping == 1.0 else x.lerp(fx, self.damping)
        # The value stays the one whose residual is reported; only the gradient is that of the steps.
        result.x = result.x.detach() + (x - x.detach())
        return result
