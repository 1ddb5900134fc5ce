"""The inverse that the forward solve has estimated, shared with the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import positive, settle, wrong
from ..equations.function import FunctionMap
from ..equations.map import Map
from ..loop.iterate import SolveResult, iterate, unit_of
from ..solution import BackwardReport, OnFailure
from ..solvers import Solver
from ..solvers.state import InverseEstimate
from .base import Adjoint
from .implicit import BackwardSolve, attached


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
        self, f: Map, x0: Tensor | None, solver: Solver, on_failure: OnFailure, trace: bool, report: BackwardReport
    ) -> SolveResult:
        if not torch.is_grad_enabled():
            return iterate(f, x0, solver, trace=trace)
        result = iterate(f, x0, solver, trace=trace, keep_inverse=True)
        if result.inverse is None:
            raise wrong(
                "SHINE", "a forward solver that keeps an estimate of the inverse", type(solver).__name__,
                "Use solver=Broyden(), or another adjoint.",
            )  # fmt: skip
        at = f.linearize(result.x)
        if at is None or not at.value.requires_grad:
            return result
        if isinstance(f, FunctionMap):  # whose evaluation shows whether samples influence one another
            result.fx = at.value.detach()
        estimate = _Estimate(result.inverse, self.fallback)
        backward: Callable[[Tensor], Tensor] = estimate
        if self.refine is not None:
            backward = BackwardSolve(f, at, self.refine, "ignore", trace, report, start=estimate)
        result.x = attached(at, result.x, backward)
        return result


@dataclass(frozen=True)
class _Estimate:
    """g ↦ Hᵀg, or g for the samples of which the ratio of their norms is too large to be believed."""

    inverse: InverseEstimate
    fallback: float | None

    def __call__(self, g: Tensor) -> Tensor:
        with torch.no_grad():
            scale = unit_of(g)
            unit = g / scale
            v = self.inverse.transpose_apply(unit)
            if self.fallback is not None:
                size, bound = torch.linalg.vector_norm(v, dim=1), torch.linalg.vector_norm(unit, dim=1) * self.fallback
                v = torch.where((size <= bound).unsqueeze(1), v, unit)
            return v * scale
