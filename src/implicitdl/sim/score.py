"""How good a model is on a loader, for classes and for numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .._checks import wrong
from ..training.evaluate import evaluating, pair
from .states import place_of


def score(model: nn.Module, loader: Iterable[Any]) -> float:
    """The accuracy in [0, 1] where targets are classes, (batch,) integers; else the mean squared error.

    Arguments:
        model: it runs in evaluation mode, on its own device and in its own dtype, to which inputs are cast.
        loader: batches (inputs, targets), as they come out of it.

    Raises:
        ArgumentError: no batches, or batches that are no pairs.

    Example:
        >>> import torch
        >>> from implicitdl.sim import score
        >>> score(torch.nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))])
        0.5
        >>> score(torch.nn.Identity(), [(torch.ones(2, 1), torch.zeros(2))])
        1.0
    """
    place = place_of(model)
    total, count = 0.0, 0
    with evaluating(model):
        for batch in loader:
            u, target = pair("score", batch)
            y = model(u.to(*place))
            target = target.to(y.device)
            number = target.is_floating_point()
            hits = (y - target.reshape(y.shape)).square() if number else y.argmax(dim=1) == target
            total, count = total + float(hits.sum()), count + hits.numel()
    if count == 0:
        raise wrong("score", "a loader with batches", "an empty one", "Check the data set.")
    return total / count
