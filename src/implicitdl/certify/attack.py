"""Projected gradient descent: inputs near a sample that the model gets wrong, if it finds any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._internal.errors import non_negative, positive_int, wrong
from .labels import check_labels, losing_by

# Step size in units of ε/steps: far enough to cross the ball, and to come back from a face (Madry et al. 2018).
_STRIDE = 2.5


def pgd(
    model: Callable[[Tensor], Tensor],
    u: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int = 20,
    restarts: int = 1,
    domain: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The worst inputs that signed gradient steps find within ε of u.

    They ascend max_j≠label y_j − y_label, which is positive exactly where the model is wrong.  The first start is u
    itself, so that a sample that is wrong without an attack stays wrong; the other restarts begin at random points of
    the ball.  A model with one output says label 1 where y > 0, else 0.

    Arguments:
        model: maps inputs to class scores (batch, q); differentiable in its input, in the dtype of u.
        u: (batch, \\*any).
        labels: (batch,) int64, class numbers.
        eps: ε ≥ 0, of every component.
        steps: gradient steps of each restart.
        restarts: starts, of which the first is u.
        domain: the least and the greatest value of a component; None for any.
        generator: of the random starts; torch's global one by default.

    Returns:
        Inputs of the shape of u, each the worst point that was seen for its sample.

    Raises:
        ArgumentError: ε < 0, or labels that do not fit.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks (2018).

    Example:
        >>> import torch
        >>> from implicitdl import certify
        >>> certify.pgd(lambda u: torch.cat([u, 1 - u], 1), torch.tensor([[0.6]]), torch.tensor([0]), 0.2)
        tensor([[0.4000]])
    """
    non_negative("pgd", "eps", eps)
    positive_int("pgd", "steps", steps)
    positive_int("pgd", "restarts", restarts)
    if not u.is_floating_point():
        raise wrong("pgd", "u of a floating-point dtype", u.dtype, "Cast it to the dtype of the weights.")
    check_labels("pgd", labels, len(u))
    u = u.detach()
    low, high = u - eps, u + eps
    if domain is not None:
        low, high = low.clamp(min=domain[0]), high.clamp(max=domain[1])
    worst, most = u, torch.full_like(labels, -torch.inf, dtype=u.dtype)
    for restart in range(restarts):
        at = u
        if restart:
            at = low + (high - low) * torch.rand(u.shape, generator=generator, dtype=u.dtype, device=u.device)
        for _ in range(steps + 1):  # the last one only looks
            with torch.enable_grad():
                at = at.detach().requires_grad_()
                lead = _lead(model, at, labels)
                (g,) = torch.autograd.grad(lead.sum(), at)
            at, lead = at.detach(), lead.detach()
            better = lead > most
            most = torch.where(better, lead, most)
            worst = torch.where(better.view(-1, *[1] * (u.dim() - 1)), at, worst)
            at = torch.clamp(at + _STRIDE * eps / steps * g.sign(), low, high)
    return worst


def _lead(model: Callable[[Tensor], Tensor], u: Tensor, labels: Tensor) -> Tensor:
    y = model(u)
    if y.dim() != 2 or len(y) != len(u):
        raise wrong("pgd", f"a model with scores of shape (batch={len(u)}, q)", tuple(y.shape))
    check_labels("pgd", labels, len(u), y.shape[1])
    return losing_by(y, labels)
