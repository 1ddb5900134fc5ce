"""The inverse that the forward solve has estimated, shared with the backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._internal.errors import positive, settle, wrong
from ..equations.linearize import linearize
from ..equations.map import RowMap
from ..loop.iterate import iterate
from ..loop.outcome import Outcome
from ..solution import BackwardReport, OnFailure
from ..solvers import Solver
from ..solvers.inverse import InverseEstimate
from .backward import BackwardSolve, attached, depends_on_weights, scaled
from .base import Adjoint


@dataclass(frozen=True, kw_only=True)
class SHINE(Adjoint):
    """An approximate gradient at no solve: v ≈ Hᵀg, with the H ≈ (I − J)⁻¹ that the forward solver ends with.

    Bias: a quasi-Newton solver learns (I − J)⁻¹ only along the directions it has stepped in, so the error does not
    vanish with the forward tolerance.  Cost: no product with Jᵀ beyond the one into the weights, and the memory of the
    estimate, twice as many states as the forward solver remembers.  A second derivative raises.

    Arguments:
        fallback: the ratio ‖Hᵀg‖ / ‖g‖ above which a sample's estimate is distrusted, and its gradient is the
            Jacobian-free v = g instead; None trusts every estimate.
        refine: a solver of v = g + Jᵀv to start at the estimate; its ``max_steps`` is the price, its figures are in
            the report, and missing its tolerance is no failure.  None takes the estimate as it is.

    Raises:
        ArgumentError: the forward solver keeps no estimate.

    Source: Ramzi et al., SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization and
    implicit models (2022).

    Example:
        >>> import torch
        >>> from implicitdl import SHINE, Broyden, fixed_point
        >>> b = torch.tensor([[2.0]], requires_grad=True)
        >>> f = lambda x, b: 0.5 * x + b
        >>> fixed_point(f, torch.zeros(1, 1), b, solver=Broyden(), adjoint=SHINE()).value.backward()
        >>> round(b.grad.item(), 4)
        2.0
    """

    fallback: float | None = None
    refine: Solver | None = None

    def __post_init__(self) -> None:
        settle(self, positive, "fallback")
        if self.refine is not None and not isinstance(self.refine, Solver):
            raise wrong("SHINE", "refine to be a Solver", repr(self.refine), "Pass Anderson(max_steps=5), or None.")

    def solve(
        self, f: RowMap, x0: Tensor | None, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> tuple[Tensor, Outcome]:
        if not torch.is_grad_enabled():
            return (outcome := iterate(f, x0, solver, trace=trace)).x, outcome
        with torch.no_grad():
            outcome = iterate(f, x0, solver, trace=trace, keep_inverse=True)
        if outcome.inverse is None:
            raise wrong(
                "SHINE", "a forward solver that keeps an estimate of the inverse", type(solver).__name__,
                "Use solver=Broyden(), or another adjoint.",
            )  # fmt: skip
        at = linearize(f, outcome.x)
        if at is None or not depends_on_weights(at):
            return outcome.x, outcome
        estimate = _Estimate(outcome.inverse, self.fallback)
        outcome = replace(outcome, fx=at.value.detach())
        if self.refine is None:
            return attached(at, outcome.x, estimate), outcome
        backward = BackwardSolve(f, at, self.refine, "ignore", trace, report, start=estimate)
        return attached(at, outcome.x, backward), outcome


@dataclass(frozen=True)
class _Estimate:
    """g ↦ Hᵀg, or g for the samples of which the ratio of their norms is too large to be believed."""

    inverse: InverseEstimate
    fallback: float | None

    def __call__(self, g: Tensor) -> Tensor:
        with torch.no_grad():
            unit, scale = scaled(g)
            v = self.inverse.transpose_apply(unit)
            if self.fallback is not None:
                size, bound = torch.linalg.vector_norm(v, dim=1), torch.linalg.vector_norm(unit, dim=1) * self.fallback
                v = torch.where((size <= bound).unsqueeze(1), v, unit)
            return v * scale
