"""Sensitivity, Interval, Crown: ways to bound what a model does on a box, each tighter and dearer than the last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._internal.errors import non_negative_int, settle
from ..solvers import Solver
from . import crown
from .domain import Box
from .functionals import Functionals
from .interval import enclosure
from .lines import lines
from .normal import Contractive
from .sensitivity import around_center

# Bounds closer than this differ by what rounding was allowed for, and by the tolerance of their solves.
_TIE = 1e-8


class Upper(NamedTuple):
    """Upper bounds of some functionals, (batch, m), and where a raw adjoint bound, if any, was above the interval's."""

    value: Tensor
    lost: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """How to bound affine functions of state and input over a box of inputs.

    Arguments:
        solver: solves the bound's own equilibria; `Auto()` by default.  Its accuracy decides how tight the bound is and
            never whether it is true.
    """

    solver: Solver | None = None

    @abstractmethod
    def uppers(self, model: Contractive, u: Box, of: Sequence[Functionals]) -> list[Upper]:
        """An upper bound of every functional, true for every input of the box."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Method):
    """|x − x₀| ≤ (I − M)⁻¹G|B|ρ around the box's centre: the worst case of all inputs, for any φ of bounded slope.

    Source: El Ghaoui et al., Implicit Deep Learning (2021), §5; see `sensitivity`.
    """

    def uppers(self, model: Contractive, u: Box, of: Sequence[Functionals]) -> list[Upper]:
        x = around_center(model, u, self.solver)
        return [_in_boxes(model, x, u, part) for part in of]


@dataclass(frozen=True, kw_only=True)
class Interval(Method):
    """Interval propagation, for a nondecreasing φ; never looser than `Sensitivity`.

    Source: Gowal et al., On the Effectiveness of Interval Bound Propagation (2018), for layers; Jafarpour et al.,
    Robustness Certificates for Implicit Neural Networks (2021), for equilibria.
    """

    def uppers(self, model: Contractive, u: Box, of: Sequence[Functionals]) -> list[Upper]:
        x = enclosure(model, u, self.solver).x
        return [_in_boxes(model, x, u, part) for part in of]


@dataclass(frozen=True, kw_only=True)
class Crown(Method):
    """The adjoint bound, implicit CROWN; the smaller of it and the interval bound, since the raw one may be above.

    Arguments:
        steps: of Adam on the slopes of the lower lines, for every functional its own; 0 chooses them by the smaller
            triangle.
        rounds: how often the intervals of the pre-activations are refined by the bound itself, which costs two adjoint
            solves for every state that may be on either side of its kink.  The result is never looser than without.
        solver: as for `Method`.

    Source: see `crown`.
    """

    steps: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        settle(self, non_negative_int, "steps", "rounds")

    def uppers(self, model: Contractive, u: Box, of: Sequence[Functionals]) -> list[Upper]:
        inside = enclosure(model, u, self.solver)
        by_interval = [_in_boxes(model, inside.x, u, part).value for part in of]
        smallest = by_interval
        for round_ in range(self.rounds + 1):
            if round_:
                inside = crown.refined(model, inside, u, self.steps, self.solver)
            between = lines(model.space, inside.z)
            raw = [crown.certified_uppers(model, part, between, inside, u, self.steps, self.solver) for part in of]
            smallest = [torch.minimum(before, now) for before, now in zip(smallest, raw, strict=True)]
        lost = [above - below > _TIE * (1 + below.abs()) for above, below in zip(raw, by_interval, strict=True)]
        return [Upper(*both) for both in zip(smallest, lost, strict=True)]


def _in_boxes(model: Contractive, x: Box, u: Box, of: Functionals) -> Upper:
    return Upper(of.upper(x, u) + model.slack(of.magnitude(x, u)))
