"""Backpropagation through the iterations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._internal.errors import wrong
from ..equations.map import Map, vjp
from ..loop.iterate import SolveResult, iterate
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
        self, f: Map, x0: Tensor | None, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> SolveResult:
        if f.triangular and torch.is_grad_enabled():
            raise wrong(
                "Unrolled", "a map that is iterated", "a triangular equilibrium, solved by substitution",
                "Use ImplicitAdjoint(), which costs one substitution.",
            )  # fmt: skip
        steps = _Recomputed(f) if self.checkpoint else f
        if solver.serves(f) and not solver.serves(steps):
            raise wrong(
                "Unrolled(checkpoint=True)", "a solver that asks f for values alone",
                f"{type(solver).__name__}, which reads what f is made of", "Use checkpoint=False, or another solver.",
            )  # fmt: skip
        result = iterate(steps, x0, solver, trace=trace, graph=torch.is_grad_enabled())
        if not torch.is_grad_enabled():
            return result
        # A row that stands at its solution from the start, or was set to zero, has not come there by steps.
        still = (result.stats.steps == 1) | (result.x == 0).all(dim=1)
        still = (still & result.stats.converged).unsqueeze(1)
        if not still.any():
            return result
        x = end = result.x.detach()
        for _ in range(_steps_to_settle(f, end, still, result.rtol, solver.max_steps)):
            x = steps(x)
        result.x = torch.where(still, end + (x - x.detach()), result.x)
        return result


def _steps_to_settle(f: Map, x: Tensor, still: Tensor, rtol: float, max_steps: int) -> int:
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


class _Recomputed(Map):
    """f, of which autograd keeps the input alone; noise and statistics are frozen already, and need no keeping."""

    def __init__(self, f: Map) -> None:
        self._f = f
        f.prepare()  # a matrix that the first evaluation makes would be in its record, and in no other
        self.check_interval, self.precision, self.parts, self.root = f.check_interval, f.precision, f.parts, f.root
        self.observed, self.after_zero, self.jacobian = f.observed, f.after_zero, f.jacobian  # type: ignore[method-assign]

    def __call__(self, x: Tensor, /) -> Tensor:
        fx: Tensor = checkpoint(self._f, x, use_reentrant=False, preserve_rng_state=False)
        return fx

    def take(self, rows: Tensor) -> _Recomputed | None:
        f = self._f.take(rows)
        return None if f is None else _Recomputed(f)
