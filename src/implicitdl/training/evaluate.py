"""A model's loss and accuracy over a loader."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.errors import choice, extra, wrong
from .classes import is_integer
from .meter import Meter, figures
from .processes import PRECISIONS, Device, Precision, move

Loss = Callable[[Any, Any], Tensor]


def get_valid_accuracy(
    model: nn.Module,
    loss_fn: Loss,
    dl: Iterable[Any],
    device: Device | None = None,
    *,
    mixed_precision: Precision | None = None,
) -> tuple[float, float | None]:
    """Mean loss and accuracy of a model over a loader, in evaluation mode and without gradients.

    Arguments:
        model: left in the modes (training or evaluation) that its modules had.
        loss_fn: ``loss_fn(pred, target)``, the mean over the batch.
        dl: batches (input, target).
        device: where the model is; None looks at its first parameter.
        mixed_precision: that of the training, "bf16", "fp16" or "no", whose tolerances the solves then have.

    Returns:
        ``(loss, accuracy)``: the loss is the mean over the samples.  The accuracy, in [0, 1], is that of the largest of
        several outputs where targets are integers of shape (batch,); where there is one output and a loss of logits,
        such as binary cross-entropy with logits, that of label 1 where the output is above 0 and 0 elsewhere.  None
        where the targets are no classes: for a regression, and for several labels a sample.  A NaN is never right, and
        labels that the loss leaves out (``ignore_index``) are not counted.

    Raises:
        ArgumentError: no batches, or batches that are no pairs; another precision; labels that are no classes, or one
            output for classes under a loss that does not take it for a logit.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> batches = [(torch.eye(2), torch.tensor([0, 1])), (torch.eye(2), torch.tensor([0, 0]))]
        >>> loss, accuracy = get_valid_accuracy(model, torch.nn.functional.cross_entropy, batches)
        >>> accuracy
        0.75
    """
    choice("get_valid_accuracy", "mixed_precision", mixed_precision, (None, *PRECISIONS))
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model), Meter("get_valid_accuracy", None, loss_fn=loss_fn) as meter:
        measure(_InPrecision(model, torch.device(device), mixed_precision), dl, loss_fn, torch.device(device), meter)
        found = figures(meter.sums())
    if found["loss"] is None:
        raise wrong("get_valid_accuracy", "a loader with batches", "an empty one", "Check the data set.")
    return found["loss"], found["acc"]


def autocast(device: torch.device, precision: Precision | None) -> torch.autocast:
    """The precision of a run, as accelerate computes it; in half precision a CPU has bfloat16 only."""
    dtype = torch.float16 if precision == "fp16" and device.type != "cpu" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision in ("bf16", "fp16"))


class _InPrecision:
    """The model in a precision, its answer in float32."""

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision | None) -> None:
        self.model, self.device, self.precision = model, device, precision

    def __call__(self, inputs: Any) -> Any:
        if self.precision in (None, "no"):
            return self.model(inputs)
        with autocast(self.device, self.precision):
            pred = self.model(inputs)
        return extra("accelerate.utils", "train").convert_to_fp32(pred)


def measure(
    forward: Callable[[Any], Any], loader: Iterable[Any], loss_fn: Loss, device: torch.device, meter: Meter
) -> None:
    for batch in loader:
        inputs, target = (move(part, device) for part in pair(meter.who, batch))
        pred = forward(inputs)
        meter.add(loss_of(meter.who, loss_fn, pred, target), pred, target)


def loss_of(who: str, loss_fn: Loss, pred: Any, target: Any) -> Tensor:
    """The loss of a batch; labels that are no classes are said to be so."""
    try:
        return loss_fn(pred, target)
    except (RuntimeError, IndexError) as error:
        if isinstance(pred, Tensor) and isinstance(target, Tensor) and is_integer(target) and pred.dim() > 1:
            strange = target[(target < 0) | (target >= pred.shape[1])]
            if strange.numel() and target.shape[:1] == pred.shape[:1]:
                labels = f"labels from 0 to {pred.shape[1] - 1}, one for each of {pred.shape[1]} outputs"
                do = "Number the classes from 0, or pass ignore_index to the loss."
                raise wrong(who, labels, int(strange.flatten()[0]), do) from error
        raise


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
