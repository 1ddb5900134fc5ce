"""The public doors: bounds of a model's outputs over boxes of inputs, and of its margins of classification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..statespace.space import Model
from .contraction import Contractive, Method, contractive
from .crown import Crown
from .functionals import Box, check_labels, classes, outputs, rivals
from .interval import Interval


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
