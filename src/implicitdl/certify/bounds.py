"""Bounds of a model's outputs and of its margins over boxes of inputs, by Sensitivity, Interval or Crown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._internal.errors import non_negative_int, settle, wrong
from ..solvers import Solver
from ..statespace.space import Model
from . import crown
from .contraction import Contractive, around_center, contractive
from .functionals import Box, Functionals, check_labels, classes, outputs, rivals
from .interval import enclosure

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
            between = crown.lines(model.space, inside.z)
            raw = [crown.certified_uppers(model, part, between, inside, u, self.steps, self.solver) for part in of]
            smallest = [torch.minimum(before, now) for before, now in zip(smallest, raw, strict=True)]
        lost = [above - below > _TIE * (1 + below.abs()) for above, below in zip(raw, by_interval, strict=True)]
        return [Upper(*both) for both in zip(smallest, lost, strict=True)]


def _in_boxes(model: Contractive, x: Box, u: Box, of: Functionals) -> Upper:
    return Upper(of.upper(x, u) + model.slack(of.magnitude(x, u)))


@dataclass(frozen=True, eq=False)
class Margins:
    """How far a label stays ahead of every other class.

    Attributes:
        lower: (batch, q) float64, a lower bound of y_label − y_j over the sample's box; inf at the label itself.  Of a
            model with one output (batch, 2), for the scores (0, y).
        lost: share of the bounds for which the raw adjoint bound was looser than the interval bound, which then stands;
            None for methods without one.
    """

    lower: Tensor
    lost: float | None

    @property
    def certified(self) -> Tensor:
        """(batch,) whether the label is proved to win for every input of the box."""
        return (self.lower > 0).all(1)


def output_bounds(model: Model | Contractive, box: Box, method: Method | None = None) -> Box:
    """Lower and upper bounds of every output over a box of inputs: y(u) lies between them for every u of the box.

    They are proofs: computed in float64 with all rounding outwards, and true however well the method's own equilibria
    were solved.  What they speak of is the exact equilibrium of the given weights.

    Arguments:
        model: an `ImplicitModel` or `StateSpace` whose equation contracts.
        box: the inputs.
        method: `Interval()` by default.

    Returns:
        A `Box` of outputs, (batch, q) float64.

    Raises:
        ArgumentError: a box that does not fit, an equation that is not known to contract, or a φ without such bounds.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel, certify
        >>> model = ImplicitModel(input_dim=3, output_dim=2, hidden_dim=5)
        >>> u = torch.rand(4, 3)
        >>> y = certify.output_bounds(model, certify.Box.around(u, 0.1), certify.Crown())
        >>> bool(((y.lower <= model(u)) & (model(u) <= y.upper)).all())
        True
    """
    who = "output_bounds"
    model, box, method = _arguments(who, model, box, method)
    every = outputs(model.space, len(box.lower))
    high, low = method.uppers(model, box, [every, -every])
    return Box(-low.value, high.value)


def margins(model: Model | Contractive, box: Box, labels: Tensor, method: Method | None = None) -> Margins:
    """Lower bounds of y_label − y_j over a box of inputs, for every class j.

    The difference is bounded as one function, not as the difference of two bounds.  A model with one output y says
    label 1 where y > 0, else 0: its scores are (0, y).

    Arguments:
        model: an `ImplicitModel` or `StateSpace` whose equation contracts.
        box: the inputs.
        labels: (batch,) int64, the class that should win.
        method: `Crown()` by default.

    Returns:
        The `Margins`; ``margins(...).certified`` says for which samples the label is proved to win.

    Raises:
        ArgumentError: as `output_bounds`, or labels that do not fit.

    Example:
        >>> import torch
        >>> from implicitdl import StateSpace, certify
        >>> model = StateSpace.affine(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> box = certify.Box.around(torch.tensor([[0.9, 0.1]]), 0.25)
        >>> certify.margins(model, box, torch.tensor([0])).lower  # 0.8 − 0.25 − 0.1 − 0.25 + what the domain cuts off
        tensor([[   inf, 0.3000]], dtype=torch.float64)
    """
    who = "margins"
    model, box, method = _arguments(who, model, box, method)
    check_labels(who, labels, len(box.lower), model.space.q)
    labels = labels.to(box.lower.device)
    (worst,) = method.uppers(model, box, [rivals(model.space, labels)])
    own = torch.nn.functional.one_hot(labels, classes(model.space.q)).bool()
    lost = None if worst.lost is None else int((worst.lost & ~own).sum()) / max(int((~own).sum()), 1)
    return Margins((-worst.value).masked_fill(own, torch.inf), lost)


def _arguments(
    who: str, model: Model | Contractive, box: Box, method: Method | None
) -> tuple[Contractive, Box, Method]:
    model = contractive(who, model)
    method = (Interval() if who == "output_bounds" else Crown()) if method is None else method
    if not isinstance(box, Box):
        raise wrong(who, "a Box of inputs", type(box).__name__, "Make one: Box.around(u, eps).")
    if not isinstance(method, Method):
        raise wrong(who, "method to be a Method", repr(method), "Pass an instance, such as Crown().")
    if box.lower.shape[1] != model.space.p:
        raise wrong(who, f"a box of shape (batch, p={model.space.p})", tuple(box.lower.shape))
    return model, box.to(model.space.b_x), method
