"""Which samples are classified right, by several outputs or by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._internal.errors import wrong


def right(y: Tensor, labels: Tensor) -> Tensor:
    """Whether each sample is classified right, (batch,): one that is NaN is not.

    The class is that of the largest of several outputs.  One output is a logit: label 1 where it is above 0, else 0.

    Arguments:
        y: (batch, q), or (batch,) for one output.
        labels: (batch,).

    Example:
        >>> import torch
        >>> from implicitdl.training.classes import right
        >>> right(torch.tensor([[2.0], [0.1], [-1.0]]), torch.tensor([1, 0, 0]))
        tensor([ True, False,  True])
    """
    y = y.detach().reshape(len(labels), -1)
    found = (y[:, 0] > 0).to(labels.dtype) if y.shape[1] == 1 else y.argmax(dim=1)
    return (found == labels) & ~y.isnan().any(dim=1)


def is_integer(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex())


def binary(y: Any, target: Tensor) -> bool:
    """Whether there is one output for every sample, (batch,) or (batch, 1), and a target of either shape."""
    shapes = [target.shape[:1], (*target.shape[:1], 1)]
    return isinstance(y, Tensor) and y.shape in shapes and target.shape in shapes


def zeros_and_ones(target: Tensor) -> bool:
    return bool(((target == 0) | (target == 1)).all())


def of_logits(who: str, loss_fn: Callable[[Any, Any], Tensor], y: Tensor, target: Tensor) -> bool:
    """Whether a loss takes its one output for a logit: the surer the right label, the smaller it is.

    That of binary cross-entropy with logits is so.  A squared distance is not, and one of probabilities refuses numbers
    outside [0, 1].

    Raises:
        ArgumentError: integer targets, which are classes, and a loss that takes neither.
    """

    def of(logit: float, label: int) -> float:
        return float(loss_fn(torch.full_like(y[:1], logit), torch.full_like(target[:1], label)))

    try:
        with torch.no_grad():
            return of(4.0, 1) < of(1.0, 1) < of(-1.0, 1) and of(-4.0, 0) < of(-1.0, 0) < of(1.0, 0)
    except Exception as error:  # whatever a loss of the user's raises for what it does not take
        if not is_integer(target):
            return False
        got, do = "another loss", "Use binary_cross_entropy_with_logits, or give the model an output for every class."
        raise wrong(who, "a loss of logits for one output and integer targets", got, do) from error
