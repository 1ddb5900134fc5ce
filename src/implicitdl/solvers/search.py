"""A line search whose trials are steps of the loop: every trial is one evaluation, of every sample, and is counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .state import Rows, precise

# Armijo's customary constant: any real decrease is accepted.
_DECREASE = 1e-4
# Below this part of a direction, six halvings, the direction is given up.
_SHORTEST = 2.0**-6


@dataclass(slots=True)
class Search(Rows):
    """Per sample: the point x a direction p starts from, the residual r there, and the part t of p that is tried.

    A trial is accepted where ‖r(x + tp)‖ ≤ (1 − 1e-4 t) ‖r(x)‖, and t is halved where not.  Where t has become too
    small p is given up, and plain steps x + r are taken whatever their residual: one at first, and twice as many each
    time it happens, since a method that follows the residual downhill returns to a valley that holds no solution.
    """

    x: Tensor  # (batch, d)
    r: Tensor  # (batch, d)
    p: Tensor  # (batch, d)
    size: Tensor  # (batch,)  ‖r‖
    t: Tensor  # (batch,)
    plain: Tensor  # (batch,)  plain steps to take
    pause: Tensor  # (batch,)  and how many the next time

    @staticmethod
    def start(x: Tensor) -> Search:
        """Before the first evaluation, whose point is accepted."""
        x = x.to(precise(x.dtype))
        none = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return Search(x, x, x, x.new_full((len(x),), torch.inf), x.new_ones(len(x)), none, none + 1)

    def judge(self, x: Tensor, r: Tensor, tried: Tensor | None = None, *, root: bool = False) -> tuple[Tensor, Tensor]:
        """Take over the trials x, of residual r, that are good enough; one that is not finite never is.

        Returns which samples want a new direction, and which take plain steps.  ``tried`` marks the samples whose x
        is a trial; all by default.  In a root problem the residual is no step, and a whole step p is taken in its
        place.
        """
        size = torch.linalg.vector_norm(r, dim=1)
        finite = torch.isfinite(size)
        size = torch.where(finite, size, torch.inf)
        walking = (self.plain > 0) & finite
        good = walking | ((size <= (1 - _DECREASE * self.t) * self.size) & finite)
        if tried is not None:
            good = good & tried
        self.accept(good, x, r, size)
        refused = ~good if tried is None else tried & ~good
        self.t = torch.where(refused, self.t / 2, torch.where(good, 1.0, self.t))
        lost = self.t < _SHORTEST
        self.plain = torch.where(lost, self.pause, (self.plain - walking.long()) * finite)
        self.pause = torch.where(lost, 2 * self.pause, self.pause)
        walking = self.plain > 0
        if root:
            self.aim(walking, self.p)
            return good, walking
        self.aim(walking, self.r)
        return good & ~walking, walking

    def accept(self, good: Tensor, x: Tensor, r: Tensor, size: Tensor) -> None:
        rows = good.unsqueeze(1)
        self.x, self.r = torch.where(rows, x.to(self.x.dtype), self.x), torch.where(rows, r, self.r)
        self.size = torch.where(good, size, self.size)

    def aim(self, which: Tensor, p: Tensor) -> None:
        """Try p, whole, on the samples marked."""
        self.p = torch.where(which.unsqueeze(1), p, self.p)
        self.t = torch.where(which, 1.0, self.t)

    def trial(self) -> Tensor:
        return torch.addcmul(self.x, self.t.unsqueeze(1), self.p)
