"""Training for certified robustness: cross-entropy of the scores that an adversary could reach at worst."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from .._internal.errors import non_negative, non_negative_int, positive_int, settle, wrong
from ..adjoints import Adjoint
from ..solvers import Solver
from ..statespace import StateSpace
from . import crown, interval
from .contraction import without_self_loops
from .functionals import Box, check_labels, rivals, scores


class Classifier(Protocol):
    """Scores of inputs, and the matrices they come from, with their graph to the parameters."""

    def __call__(self, u: Tensor, /) -> Tensor: ...

    def statespace(self) -> StateSpace: ...


@dataclass(frozen=True, kw_only=True)
class CertifiedLoss:
    """Cross-entropy of bounds: a loss that is small only where the label is proved to win on the whole box.

    With m_j a lower bound of y_label − y_j over the box of radius ε around u, it is

        (1 − c) CE(−m, label) + c CE(y, label),      m = (1 − β) m_interval + β m_crown.

    Of a model with one output y the scores are (0, y): labels are 0 and 1, and the clean loss is the logistic one.

    ε grows linearly from 0 in ``ramp`` steps after ``wait`` steps, and c and β go from their first to their second
    value with it.  Gradients are exact: the bounds are equilibria, and are differentiated as such.

    Arguments:
        eps: ε > 0 at the end, of every component of the input.
        ramp: steps over which ε grows.
        wait: steps before that.
        clean: c, the share of the clean loss, at the start and at the end of the ramp.
        crown: β, the share of the adjoint bound, likewise; its cost is about that of q − 1 further samples for each.
        domain: the least and the greatest value of an input's component; None for any.
        solver: of the bounds' equilibria; `Auto()` by default.
        adjoint: how they are differentiated; exactly, `ImplicitAdjoint()`, by default.

    Raises:
        ArgumentError: a number out of its range.

    Source: Gowal et al., On the Effectiveness of Interval Bound Propagation (2018), for the loss and the ramp; Zhang et
        al., Towards Stable and Efficient Training of Verifiably Robust Neural Networks (2020), for the mixture m.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel, certify
        >>> model = ImplicitModel(input_dim=3, output_dim=2, hidden_dim=5)
        >>> loss = certify.CertifiedLoss(eps=0.1, ramp=100)
        >>> value = loss(model, torch.rand(4, 3), torch.tensor([0, 1, 0, 1]), step=50)  # at ε = 0.05
        >>> value.backward()
        >>> model.A.grad.shape
        torch.Size([5, 5])
    """

    eps: float
    ramp: int
    wait: int = 0
    clean: tuple[float, float] = (0.0, 0.0)
    crown: tuple[float, float] = (0.0, 0.0)
    domain: tuple[float, float] | None = (0.0, 1.0)
    solver: Solver | None = None
    adjoint: Adjoint | None = None

    def __post_init__(self) -> None:
        settle(self, non_negative, "eps")
        settle(self, positive_int, "ramp")
        settle(self, non_negative_int, "wait")
        for name, shares in (("clean", self.clean), ("crown", self.crown)):
            if len(shares) != 2 or not all(0 <= share <= 1 for share in shares):
                raise wrong("CertifiedLoss", f"{name} to be two shares in [0, 1]", shares)

    def progress(self, step: int) -> float:
        """How far the ramp has come after so many steps, from 0 to 1."""
        return min(max((step - self.wait) / self.ramp, 0.0), 1.0)

    def __call__(self, model: Classifier, u: Tensor, labels: Tensor, step: int) -> Tensor:
        """The loss of a batch.

        Arguments:
            model: an `ImplicitModel`, or any module with ``statespace()``, of nondecreasing φ.
            u: (batch, \\*any), inside the domain.
            labels: (batch,) int64.
            step: how many steps were made before; it decides ε.
        """
        done = self.progress(step)
        clean, by_crown = (first + done * (last - first) for first, last in (self.clean, self.crown))
        loss = u.new_zeros(())
        check_labels("CertifiedLoss", labels, len(u))
        if clean < 1:
            box = Box.around(u, done * self.eps, self.domain).to(u)
            loss = (1 - clean) * F.cross_entropy(self.worst(model.statespace(), box, labels, by_crown), labels)
        if clean > 0:
            y = model(u)
            check_labels("CertifiedLoss", labels, len(u), y.shape[1])
            loss = loss + clean * F.cross_entropy(scores(y), labels)
        return loss

    def worst(self, space: StateSpace, box: Box, labels: Tensor, by_crown: float = 0.0) -> Tensor:
        """−m, (batch, classes): how far every class may be ahead of the label, whose own entry is 0."""
        check_labels("CertifiedLoss", labels, len(box.lower), space.q)
        space = without_self_loops(space)
        of = rivals(space, labels)
        x = interval.ends(space, box, self.solver, self.adjoint)
        by_interval = of.upper(x, box)
        if by_crown == 0:
            return by_interval
        between = crown.lines(space, interval.pre_activation(space, x, interval.input_term(space, box)))
        slopes = between.high_slope.unsqueeze(1), between.low_slope.unsqueeze(1)
        found = crown.relaxation(space, of, *slopes, self.solver, self.adjoint)
        bound = crown.upper(space, of, found, between.high_offset, between.low_offset, box)
        return by_interval.lerp(bound, by_crown)
