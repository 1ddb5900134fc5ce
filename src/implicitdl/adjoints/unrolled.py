"""Backpropagation through the iterations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._internal.errors import wrong
from ..equations.linearize import vjp
from ..equations.map import RowMap
from ..loop.iterate import iterate
from ..loop.outcome import Outcome
from ..solution import BackwardReport, OnFailure
from ..solvers import Solver
from .base import Adjoint


@dataclass(frozen=True, kw_only=True)
class Unrolled(Adjoint):
    """Backpropagation through the solver's own iterations: exact for what was computed, at the memory of every step.

    Bias: it is the gradient of the last iterate, which approaches the solution's as the solve converges.  With Picard
    so do derivatives of every order; those of an accelerated solver also contain its coefficients, whose second
    derivatives do not settle.  A row that starts at its solution takes no steps there: it is given as many plain steps
    at the solution as its derivative needs.  From a start near the solution there are few steps, and the gradient is
    short of what they leave of it.  Cost: what f keeps for backward is kept for every evaluation, and each is gone back
    through once.

    Arguments:
        checkpoint: keep only the state of every evaluation (and what the solver itself keeps; Picard nothing), and
            evaluate f once more in backward.  The gradient is the same.

    Source: Chen, Xu, Zhang & Guestrin, Training Deep Nets with Sublinear Memory Cost (2016), for the recomputation.
    """

    checkpoint: bool = False

    def solve(
        self, f: RowMap, x0: Tensor | None, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> tuple[Tensor, Outcome]:
        if getattr(f, "triangular", False) and torch.is_grad_enabled():
            raise wrong(
                "Unrolled", "a map that is iterated", "a triangular equilibrium, solved by substitution",
                "Use ImplicitAdjoint(), which costs one substitution.",
            )  # fmt: skip
        steps = _Recomputed(f) if self.checkpoint else f
        outcome = iterate(steps, x0, solver, trace=trace)
        if not torch.is_grad_enabled():
            return outcome.x, outcome
        # A row that stands at its solution from the start, or was set to zero, has not come there by steps.
        still = (outcome.figures.steps == 1) | (outcome.x == 0).all(dim=1)
        still = (still & outcome.figures.converged).unsqueeze(1)
        if not still.any():
            return outcome.x, outcome
        x = end = outcome.x.detach()
        for _ in range(_steps_to_settle(f, end, still, outcome.rtol, solver.max_steps)):
            x = steps(x)
        return torch.where(still, end + (x - x.detach()), outcome.x), outcome


def _steps_to_settle(f: RowMap, x: Tensor, still: Tensor, rtol: float, max_steps: int) -> int:
    """Plain steps at the solution after which the derivative stands still too: a random cotangent has vanished."""
    point = x.clone().requires_grad_()
    fx = f(point)
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x)
    v = torch.where(still, drawn, 0.0)
    enough = rtol * torch.linalg.vector_norm(v, dim=1)
    for count in range(1, max_steps + 1):
        v = vjp(fx, point, v, create_graph=False)
        if bool((torch.linalg.vector_norm(v, dim=1) <= enough).all()):
            return count
    raise wrong(
        "Unrolled", f"a map that contracts to {rtol:.0e} in {max_steps} steps where a row starts at its solution",
        "one whose steps leave more of a derivative", "Start elsewhere, or use ImplicitAdjoint().",
    )  # fmt: skip


class _Recomputed:
    """f, of which autograd keeps the input alone; noise and statistics are frozen already, and need no keeping."""

    def __init__(self, f: RowMap) -> None:
        self._f = f
        self.check_interval = f.check_interval

    def __call__(self, x: Tensor) -> Tensor:
        fx: Tensor = checkpoint(self._f, x, use_reentrant=False, preserve_rng_state=False)
        return fx

    def take(self, rows: Tensor) -> _Recomputed | None:
        f = self._f.take(rows)
        return None if f is None else _Recomputed(f)

    def __getattr__(self, name: str) -> Any:
        """What else f offers, such as the part of its state on which the residual is measured."""
        return getattr(self._f, name)
