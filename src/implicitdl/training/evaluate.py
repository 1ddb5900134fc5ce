"""Loss, accuracy and solver figures of a model over a loader."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.errors import ArgumentError, choice, extra, wrong
from ..solution import Monitor, SolveStats
from .processes import PRECISIONS, Device, Precision

Loss = Callable[[Any, Any], Tensor]
Metric = Callable[[Any, Tensor], Tensor]


class NonFiniteLossError(ArgumentError):
    """The loss became NaN or infinite; the last checkpoint is what it was."""


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
    who = "get_valid_accuracy"
    choice(who, "mixed_precision", mixed_precision, (None, *PRECISIONS))
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    device = torch.device(device)
    metrics = Metrics(who, loss_fn)
    with metrics, evaluating(model):
        for batch in dl:
            inputs, target = on_device(who, batch, device)
            with autocast(device, mixed_precision):
                pred = model(inputs)
            if mixed_precision in ("bf16", "fp16"):
                pred = extra("accelerate.utils", "train").convert_to_fp32(pred)
            metrics.loss(pred, target)
    found = metrics.figures()
    if found["loss"] is None:
        raise wrong(who, "a loader with batches", "an empty one", "Check the data set.")
    return found["loss"], found["acc"]


def autocast(device: torch.device, precision: Precision | None) -> contextlib.AbstractContextManager[Any]:
    """The precision of a run, as accelerate computes it; in half precision a CPU has bfloat16 only."""
    if precision not in ("bf16", "fp16"):
        return contextlib.nullcontext()
    dtype = torch.float16 if precision == "fp16" and device.type != "cpu" else torch.bfloat16
    return torch.autocast(device.type, dtype)


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


def pair(who: str, batch: Any) -> tuple[Any, Any]:
    """A batch as (input, target)."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        raise wrong(who, "batches (input, target)", got, "Give the loader a collate_fn that makes pairs.")
    return batch[0], batch[1]


def on_device(who: str, batch: Any, device: torch.device) -> Any:
    """A batch (input, target), tensors in any nesting of lists, tuples and dicts, on the device."""
    ahead = device.type == "cuda"  # towards the CPU it would be read before it is there
    parts = pair(who, batch)
    if all(isinstance(part, Tensor) for part in parts):
        return [part.to(device, non_blocking=ahead) for part in parts]
    return extra("accelerate.utils", "train").send_to_device(parts, device, non_blocking=ahead)


class Forward(nn.Module):
    """A thin module around the user's, which stays as it was: accelerate changes `forward` of what it prepares."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return self.model(inputs)


class Metrics:
    """Sums of loss, score and solver steps over the batches of an epoch, and their means. Open while the model runs.

    Reading a tensor waits for the device. So the figures of a batch are kept, and read in `read`. Only on the CPU,
    where reading costs nothing, is every loss read at once, before its step is taken.

    Arguments:
        who: the caller, for its errors.
        loss_fn: ``loss_fn(pred, target)``, the mean over the batch.
        metric: ``metric(pred, target)`` of shape (batch,), larger is better; None means accuracy for classes.
        where: what is measured, such as "epoch 3", for the error of a non-finite loss; None lets it pass.
        advice: what to do about a non-finite loss.
    """

    def __init__(
        self, who: str, loss_fn: Loss, metric: Metric | None = None, where: str | None = None, advice: str = ""
    ) -> None:
        self.who, self._loss_fn, self._metric, self._where, self._advice = who, loss_fn, metric, where, advice
        self._of_logits: bool | None = None
        # (loss, samples, total score, samples with a score) of the batches that have not been read
        self._kept: list[tuple[Tensor, int, Tensor | float, int]] = []
        self._batches, self._loss, self._samples, self._score, self._scored = 0, 0.0, 0, 0.0, 0
        # forward and backward: [evaluations, solves of one sample, of which missed the tolerance]
        self._forward, self._backward = [0, 0, 0], [0, 0, 0]

    def __enter__(self) -> Metrics:
        self._monitor = Monitor()
        self._monitor.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._monitor.__exit__(kind, error, trace)
        if isinstance(error, Exception):
            # On an accelerator a NaN loss shows first as whatever it breaks next: name it instead.
            self.read()

    def loss(self, pred: Any, target: Any) -> Tensor:
        """The loss of a batch, which is added to the sums, as is its score where there is one."""
        loss = self._called(pred, target)
        if not isinstance(target, Tensor) or target.ndim == 0:
            got = "a number" if isinstance(target, Tensor) else f"a {type(target).__name__}"
            raise wrong(self.who, "targets to be a tensor with a row per sample", got, "Collate them so.")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise wrong(self.who, "loss_fn(pred, target) to be one number", got, "Average it over the batch.")
        score = self._hits(pred, target) if self._metric is None else self._metric(pred, target)
        if self._metric is not None and (not isinstance(score, Tensor) or score.shape != target.shape[:1]):
            got = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            expected = f"metric(pred, target) of shape ({len(target)},)"
            raise wrong(self.who, expected, got, "Give one value per sample.")
        total: Tensor | float = math.nan  # an accuracy of some batches and not of others is none: NaN stays in the sum
        scored = 0
        if score is not None:
            total, scored = score.detach().sum(), len(score)
        self._kept.append((loss.detach(), len(target), total, scored))
        if loss.device.type == "cpu":
            self.read()
        return loss

    def read(self) -> None:
        """Take in the batches that have come since the last time, and raise at the first loss that is not finite."""
        kept, self._kept = self._kept, []
        for loss, samples, total, scored in kept:
            self._batches += 1
            value = loss.item()
            if self._where is not None and not math.isfinite(value):
                batch = f"{value} in batch {self._batches} of {self._where}"
                raise NonFiniteLossError(str(wrong(self.who, "a finite loss", batch, self._advice)))
            self._loss += value * samples
            self._samples += samples
            self._score += float(total)
            self._scored += scored

    def means(self, name: str, place: torch.device | None = None) -> dict[str, Any]:
        """The figures of a whole loader of this name, over all processes where there are several, each on its `place`.

        Raises:
            ArgumentError: it had no batches.
        """
        found = self.figures(place)
        if found["loss"] is None:
            do = "A generator runs dry after one epoch: give a DataLoader or a list."
            raise wrong(self.who, f"{name} with batches", f"none in {self._where}", do)
        return found

    def figures(self, place: torch.device | None = None) -> dict[str, Any]:
        """The means so far; None where there was nothing to take a mean of."""
        self.read()
        for solves, into in ((self._monitor.forward, self._forward), (self._monitor.backward, self._backward)):
            _drain(solves, into)
        sums = [self._loss, self._samples, self._score, self._scored, *self._forward, *self._backward]
        if place is not None:
            shared = torch.tensor(sums, dtype=torch.float64, device=place)
            torch.distributed.all_reduce(shared)
            sums = shared.tolist()
        loss, samples, score, scored, f_steps, f_solves, f_missed, b_steps, b_solves, b_missed = sums

        def mean(value: float, count: float) -> float | None:
            return value / count if count else None

        return {
            "loss": mean(loss, samples),
            "acc": None if math.isnan(score) else mean(score, scored),
            "forward_steps": mean(f_steps, f_solves),
            "backward_steps": mean(b_steps, b_solves),
            "missed": mean(f_missed + b_missed, f_solves + b_solves),
        }

    def _called(self, pred: Any, target: Any) -> Tensor:
        """What loss_fn returns; labels that are no classes are said to be so."""
        try:
            return self._loss_fn(pred, target)
        except (RuntimeError, IndexError) as error:
            if isinstance(pred, Tensor) and isinstance(target, Tensor) and is_integer(target) and pred.dim() > 1:
                strange = target[(target < 0) | (target >= pred.shape[1])]
                if strange.numel() and target.shape[:1] == pred.shape[:1]:
                    labels = f"labels from 0 to {pred.shape[1] - 1}, one for each of {pred.shape[1]} outputs"
                    do = "Number the classes from 0, or pass ignore_index to the loss."
                    raise wrong(self.who, labels, int(strange.flatten()[0]), do) from error
            raise

    def _hits(self, pred: Any, target: Tensor) -> Tensor | None:
        """Whether each sample was classified right; None where the targets are no classes.

        A label that is no class is one that the loss leaves out, such as that of ``ignore_index``.
        """
        one = (target.shape[:1], (*target.shape[:1], 1))
        if isinstance(pred, Tensor) and pred.shape in one and target.shape in one:
            if self._of_logits is None:
                self._of_logits = self._takes_logits(pred, target)
            if not self._of_logits:
                return None
            if ((target == 0) | (target == 1)).all():
                return right(pred, target.reshape(-1))
            if is_integer(target):
                raise wrong(self.who, "labels 0 and 1 for one output", target.unique().tolist(), "Number them so.")
            return None
        classes = is_integer(target) and target.dtype != torch.bool and target.ndim == 1
        if not classes or not isinstance(pred, Tensor) or pred.shape[:-1] != target.shape:
            return None
        return right(pred, target)[(target >= 0) & (target < pred.shape[1])]

    def _takes_logits(self, y: Tensor, target: Tensor) -> bool:
        """Whether the loss takes its one output for a logit: the surer the right label, the smaller it is.

        That of binary cross-entropy with logits is so. A squared distance is not, and one of probabilities refuses
        numbers outside [0, 1].
        """

        def of(logit: float, label: int) -> float:
            return float(self._loss_fn(torch.full_like(y[:1], logit), torch.full_like(target[:1], label)))

        try:
            with torch.no_grad():
                return of(4.0, 1) < of(1.0, 1) < of(-1.0, 1) and of(-4.0, 0) < of(-1.0, 0) < of(1.0, 0)
        except Exception as error:  # whatever a loss of the user's raises for what it does not take
            if not is_integer(target):
                return False
            got, do = (
                "another loss",
                "Use binary_cross_entropy_with_logits, or give the model an output for every class.",
            )
            raise wrong(self.who, "a loss of logits for one output and integer targets", got, do) from error


def right(y: Tensor, labels: Tensor) -> Tensor:
    """Whether each sample is classified right, (batch,): one that is NaN is not.

    The class is that of the largest of several outputs.  One output is a logit: label 1 where it is above 0, else 0.

    Arguments:
        y: (batch, q), or (batch,) for one output.
        labels: (batch,).

    Example:
        >>> import torch
        >>> from implicitdl.training.evaluate import right
        >>> right(torch.tensor([[2.0], [0.1], [-1.0]]), torch.tensor([1, 0, 0]))
        tensor([ True, False,  True])
    """
    y = y.detach().reshape(len(labels), -1)
    found = (y[:, 0] > 0).to(labels.dtype) if y.shape[1] == 1 else y.argmax(dim=1)
    return (found == labels) & ~y.isnan().any(dim=1)


def is_integer(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex())


def _drain(solves: list[SolveStats], into: list[int]) -> None:
    """Add up a monitor's figures and let them go: an epoch of them is not kept."""
    if solves:
        samples = [(stats.steps.reshape(-1), stats.converged.reshape(-1)) for stats in solves]
        steps, converged = map(torch.cat, zip(*samples, strict=True))
        solves.clear()
        into[0] += int(steps.sum())
        into[1] += steps.numel()
        into[2] += int((~converged).sum())
