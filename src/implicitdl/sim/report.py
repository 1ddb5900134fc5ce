"""What is known of a SIM: how well each row was solved, and what it became."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._internal.errors import shown
from ..constraints import WeightedRowScaling
from ..nn import ImplicitModel
from .matching import Matching
from .solution import RowReport, SIMSolution
from .storage import Layer


@dataclass(frozen=True)
class SIMReport:
    """How well each row of a SIM was solved, in the units that it was solved in.

    Attributes:
        hidden: a `RowReport` of the rows of (A, B): objective, gap, ‖a‖₁, support, converged, each (n,).
        output: the same of the rows of (C, D), each (q,).
        weights: v (n,), the units of the states; None where they were left as they are.
        layers: whose states the rows of A are, in their order.
        nonzeros: of A, B, C and D together.
        norm: max_i Σ_j |a_ij| v_j / v_i, at most κ / max(1, max|φ'|) unless the solver does not promise it; v is 1
            where the model keeps the scaled states.
        samples: m.
    """

    hidden: RowReport
    output: RowReport
    weights: Tensor | None
    layers: tuple[Layer, ...]
    nonzeros: int
    norm: float
    samples: int

    def facts(self) -> list[tuple[str, str]]:
        """What to tell of it, name and words."""
        missed = sum(int((~part.converged).sum()) for part in (self.hidden, self.output))
        total = sum(len(part.converged) for part in (self.hidden, self.output))
        gap = max(float(part.relative_gap.max()) for part in (self.hidden, self.output))
        units = "as they are" if self.weights is None else f"in units of 1 to {float(self.weights.max()):.4g}"
        return [
            ("rows converged", f"{total - missed} of {total}, worst relative gap {gap:.1e}"),
            ("states", f"{sum(layer.features for layer in self.layers)} of {self.samples:,} samples, {units}"),
            ("‖A‖∞", f"{self.norm:.9g}"),
            ("nonzeros", f"{self.nonzeros:,}"),
        ]

    def __str__(self) -> str:
        return shown("; ".join(f"{name}: {words}" for name, words in self.facts()))


def report_of(matching: Matching, found: SIMSolution, model: ImplicitModel) -> SIMReport:
    """The report of a solution and of the model that was made of it."""
    space = model.statespace().detach()
    A = space.A.double().abs()
    if isinstance(model.constraint, WeightedRowScaling) and model.constraint.weights is not None:
        v = model.constraint.weights.to(A)
        A = A * v / v[:, None]
    return SIMReport(
        hidden=found.hidden,
        output=found.output,
        weights=matching.weights,
        layers=matching.layers,
        nonzeros=sum(int((part != 0).sum()) for part in space.matrices),
        norm=float(A.sum(dim=1).max()),
        samples=matching.states["U"].shape[1],
    )
