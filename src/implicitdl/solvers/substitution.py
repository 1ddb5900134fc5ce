"""Exact solution of a strictly triangular equilibrium."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..equations.map import Map
from .base import Solver


@dataclass(frozen=True, kw_only=True)
class Substitution(Solver):
    """x_i = φ(b_i + Σ_{j>i} a_ij x_j), from the last component to the first.

    For maps that are `triangular`, such as an Equilibrium with ``triangular=True``; it costs one sweep, exists for
    any φ and any size of A, and takes no iteration.  The loop evaluates f once more to report the residual.
    """

    exact: ClassVar[bool] = True

    def serves(self, f: Map) -> bool:
        return f.triangular

    def needs(self, f: Map) -> tuple[str, str, str]:
        return (
            "an Equilibrium with a strictly triangular A", type(f).__name__,
            "Use Auto(), which substitutes where it can.",
        )  # fmt: skip

    def step(self, f: Map, x: Tensor, fx: Tensor, state: Any) -> tuple[Tensor, Any, int]:
        with torch.no_grad():  # columns are written in place; the adjoint, not autograd, differentiates the result
            return f.substitute(), None, 1
