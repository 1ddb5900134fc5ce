"""What is known of the rows that a solver found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..solution import ImplicitFunctionWarning


class SIMWarning(ImplicitFunctionWarning):
    """Rows of state matching were not solved to the tolerance, or what was solved does not bound A."""


@dataclass(frozen=True)
class RowReport:
    """How well each row was solved; every field is (rows,).

    Attributes:
        objective: the objective at the row returned, from the data.
        gap: objective minus the value of a feasible dual point, ≥ 0: the row is within it of the optimum.
            Infinite where no bound is known.
        norm: ‖a‖₁.
        support: nonzeros of (a, b).
        rounding: what rounding alone can make of the gap, where the residual is nothing else.
        converged: whether gap ≤ tol · objective + rounding, which is relative_gap ≤ tol.
    """

    objective: Tensor
    gap: Tensor
    norm: Tensor
    support: Tensor
    rounding: Tensor
    converged: Tensor

    def take(self, rows: Tensor) -> RowReport:
        return RowReport(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device) -> RowReport:
        return RowReport(*(getattr(self, field.name).to(device) for field in fields(self)))

    def put(self, rows: Tensor, part: RowReport) -> None:
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(part, field.name)

    @property
    def relative_gap(self) -> Tensor:
        """(gap − rounding)₊ / objective; 0 where the gap is rounding alone, and infinite where it is."""
        above = (self.gap - self.rounding).clamp(min=0)
        return torch.where((above > 0) & above.isfinite(), above / self.objective, above)


@dataclass(frozen=True)
class RowSolution:
    """w = (a, b) of every row, (rows, n) and (rows, p), and its report."""

    a: Tensor
    b: Tensor
    report: RowReport

    @property
    def w(self) -> Tensor:
        return torch.cat([self.a, self.b], dim=1)

    def take(self, rows: Tensor) -> RowSolution:
        return RowSolution(self.a[rows], self.b[rows], self.report.take(rows))


@dataclass(frozen=True, eq=False)
class SIMSolution:
    """What a solver found: Z ≈ AX + BU + b_x and Y ≈ CX + DU + b_y, in float64.  Unpacks as ``A, B, C, D``.

    Attributes:
        A, B, C, D: (n, n), (n, p), (q, n), (q, p).
        hidden: the report of the rows of (A, B).
        output: the report of the rows of (C, D).
        b_x, b_y: (n,) and (q,); None without intercepts.
        factors: (L, R) with A = LRᵀ, where the solver gives A in this form.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    hidden: RowReport
    output: RowReport
    b_x: Tensor | None = None
    b_y: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.A, self.B, self.C, self.D))

    def to(self, device: torch.device) -> SIMSolution:
        A, B, C, D = (part.to(device) for part in self)
        b_x, b_y = (None if part is None else part.to(device) for part in (self.b_x, self.b_y))
        factors = None if self.factors is None else (self.factors[0].to(device), self.factors[1].to(device))
        return SIMSolution(A, B, C, D, self.hidden.to(device), self.output.to(device), b_x, b_y, factors)
