"""A loss term on how a DEQ's map depends on its state, which any training loop can add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._internal.errors import positive, positive_int
from ..equations.jacobian import jacobian_regularization
from .deq import DEQ


class JacobianPenalty:
    """weight · ‖∂f/∂x‖²_F / d at the solutions of a `DEQ`: a loss term that keeps its equilibrium easy to find.

    While it is there, every forward pass of the layer in training, with gradients, is followed by the estimate of
    `jacobian_regularization`, at the solution and without the path through it; a call gives their sum.

    Arguments:
        deq: the layer, inside any model.
        weight: > 0.
        samples: as for `jacobian_regularization`.

    Source: Bai, Koltun & Kolter, Stabilizing Equilibrium Models by Jacobian Regularization (2021).

    Example:
        >>> import torch
        >>> from implicitdl import DEQ
        >>> from implicitdl.nn import JacobianPenalty, TanhBlock
        >>> deq = DEQ(TanhBlock(4))
        >>> penalty = JacobianPenalty(deq, 0.5)
        >>> u = torch.randn(8, 4)
        >>> loss = deq(u).square().mean() + penalty()
        >>> loss.backward()
    """

    def __init__(self, deq: DEQ, weight: float, samples: int = 1) -> None:
        self.weight = positive("JacobianPenalty", "weight", weight)
        self.samples = positive_int("JacobianPenalty", "samples", samples)
        self._terms: list[Tensor] = []
        # Inside the forward pass, where autocast is as it was for the solve.
        self._hook = deq.register_forward_hook(self._look)

    def __call__(self) -> Tensor:
        """The sum over the forward passes since the last call, a scalar; 0 where there was none."""
        terms, self._terms = self._terms, []
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float32, device="cpu")

    def remove(self) -> None:
        """Leave the layer as it was."""
        self._hook.remove()

    def _look(self, deq: DEQ, u: tuple[Any, ...], x: Any) -> None:
        if not (deq.training and torch.is_grad_enabled()):
            return
        inputs = u[0] if len(u) == 1 and isinstance(u[0], tuple) else u
        at = tuple(part.detach() for part in x) if isinstance(x, tuple) else x.detach()
        self._terms.append(self.weight * jacobian_regularization(deq.f, at, *inputs, samples=self.samples))
