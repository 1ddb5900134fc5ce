"""How good a model is on a loader, for classes and for numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .._internal.errors import wrong
from ..training.evaluate import evaluating, is_integer, pair, right
from .states import place_of


def score(model: nn.Module, loader: Iterable[Any]) -> float:
    """The accuracy in [0, 1] where targets are classes, integers; the mean squared error where they are floating.

    Arguments:
        model: it runs in evaluation mode, on its own device and in its own dtype, to which inputs are cast.
        loader: batches (inputs, targets), as they come out of it.  Classes are numbers (batch,), or one-hot (batch, q).
            Of one output it is a logit: label 1 where it is above 0, else 0.

    Raises:
        ArgumentError: no batches, or batches that are no pairs; labels that are no classes of the model's; targets of
            another shape than its outputs.

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
            found = _scores(y, target.to(y.device) if isinstance(target, Tensor) else target)
            total, count = total + float(found.sum()), count + found.numel()
    if count == 0:
        raise wrong("score", "a loader with batches", "an empty one", "Check the data set.")
    return total / count


def _scores(y: Tensor, target: Any) -> Tensor:
    """Of every sample whether it is right, or of every output its squared distance."""
    if not isinstance(target, Tensor) or target.shape[:1] != y.shape[:1]:
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise wrong("score", f"targets to be a tensor of shape (batch={len(y)}, ...)", got, "Collate them so.")
    if not is_integer(target):
        if target.numel() != y.numel():
            raise wrong("score", f"floating targets of shape {tuple(y.shape)}", tuple(target.shape))
        return (y - target.reshape(y.shape)).square()
    labels = target.long()
    if target.dim() == 2 and target.shape == y.shape and y.shape[1] > 1:
        if not bool(((labels == 0) | (labels == 1)).all() and (labels.sum(dim=1) == 1).all()):
            do = "Give several labels a sample as floating numbers: they are scored by their squared distance."
            raise wrong("score", "integer targets (batch, q) to be one-hot", "rows with another sum than 1", do)
        labels = labels.argmax(dim=1)
    if labels.numel() != len(y):
        raise wrong("score", f"classes of shape (batch={len(y)},), or one-hot {tuple(y.shape)}", tuple(target.shape))
    labels = labels.reshape(-1)
    most = max(2, y.shape[1:].numel()) - 1
    strange = labels[(labels < 0) | (labels > most)]
    if strange.numel():
        raise wrong("score", f"labels from 0 to {most}", int(strange[0]), "Number the classes from 0.")
    return right(y, labels)
