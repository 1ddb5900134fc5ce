"""A model's loss and accuracy over a loader."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import wrong
from .meter import Meter, figures
from .processes import Device, move

Loss = Callable[[Any, Any], Tensor]


def get_valid_accuracy(
    model: nn.Module, loss_fn: Loss, dl: Iterable[Any], device: Device | None = None
) -> tuple[float, float | None]:
    """Mean loss and accuracy of a model over a loader, in evaluation mode and without gradients.

    Arguments:
        model: left in the modes (training or evaluation) that its modules had.
        loss_fn: ``loss_fn(pred, target)``, the mean over the batch.
        dl: batches (input, target).
        device: where the model is; None looks at its first parameter.

    Returns:
        ``(loss, accuracy)``: the accuracy in [0, 1], None where the targets are no classes.

    Raises:
        ArgumentError: no batches, or batches that are no pairs.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> batches = [(torch.eye(2), torch.tensor([0, 1])), (torch.eye(2), torch.tensor([0, 0]))]
        >>> loss, accuracy = get_valid_accuracy(model, torch.nn.functional.cross_entropy, batches)
        >>> accuracy
        0.75
    """
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model), Meter("get_valid_accuracy", None) as meter:
        measure(model, dl, loss_fn, torch.device(device), meter)
        found = figures(meter.sums())
    if found["loss"] is None:
        raise wrong("get_valid_accuracy", "a loader with batches", "an empty one", "Check the data set.")
    return found["loss"], found["acc"]


def measure(forward: nn.Module, loader: Iterable[Any], loss_fn: Loss, device: torch.device, meter: Meter) -> None:
    for batch in loader:
        inputs, target = (move(part, device) for part in pair(meter.who, batch))
        pred = forward(inputs)
        meter.add(loss_fn(pred, target), pred, target)


def pair(who: str, batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        raise wrong(who, "batches (input, target)", got, "Give the loader a collate_fn that makes pairs.")
    return batch[0], batch[1]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    with contextlib.suppress(NotImplementedError):  # an exported program stays in the mode it was exported in
        model.eval()
    try:
        # Not inference_mode: what a module caches in it could not be used in training any more.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def length_of(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a generator, or a loader of an iterable data set
        return None
