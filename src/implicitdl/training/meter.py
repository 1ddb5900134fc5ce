"""What is measured over the batches of an epoch, read from the device only now and then."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .._internal.errors import ArgumentError, wrong
from ..solution import Figures, Monitor
from .classes import binary, is_integer, of_logits, right, zeros_and_ones

Metric = Callable[[Any, Tensor], Tensor]


class NonFiniteLossError(ArgumentError):
    """The loss became NaN or infinite; the last checkpoint is what it was."""


class Meter:
    """Sums loss, score and solver steps while it is open.

    Reading a tensor waits for the device. So figures are kept as they come and read together in `read`; only
    on the CPU, where reading costs nothing, is every loss looked at before its step is taken.

    Arguments:
        who: the caller, for its errors.
        where: what is measured, such as "epoch 3", for the error of a non-finite loss; None lets it pass.
        metric: ``metric(pred, target)`` of shape (batch,), larger is better; None means accuracy for classes.
        loss_fn: says whether one output is a logit; without it one output has no accuracy.
        advice: what to do about a non-finite loss.
    """

    def __init__(
        self,
        who: str,
        where: str | None,
        metric: Metric | None = None,
        advice: str = "",
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.who, self._where, self._metric, self._advice = who, where, metric, advice
        self._loss_fn, self._of_logits = loss_fn, None if loss_fn is not None else False
        self._monitor = Monitor()
        self._losses: list[tuple[Tensor, int]] = []
        self._scores: list[tuple[Tensor, int]] = []
        self._batches = 0
        self._loss = self._score = 0.0
        self._samples = self._scored = 0
        # forward and backward: [evaluations, solves of one sample, of which missed the tolerance]
        self._forward, self._backward = [0, 0, 0], [0, 0, 0]

    def __enter__(self) -> Meter:
        self._monitor.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._monitor.__exit__(kind, error, trace)

    def add(self, loss: Tensor, pred: Any, target: Any) -> None:
        """One batch: its mean loss, and its score where there is one."""
        if not isinstance(target, Tensor) or target.ndim == 0:
            got = "a number" if isinstance(target, Tensor) else f"a {type(target).__name__}"
            raise wrong(self.who, "targets to be a tensor with a row per sample", got, "Collate them so.")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise wrong(self.who, "loss_fn(pred, target) to be one number", got, "Average it over the batch.")
        score = self._hits(pred, target) if self._metric is None else self._checked_score(pred, target)
        # An accuracy of some batches and not of others would be none.
        total, scored = (math.nan, 0) if score is None else (score.detach().sum(), len(score))
        if loss.device.type == "cpu":
            self._take_loss(loss.item(), len(target))
            self._take_score(float(total), scored)
        else:
            self._losses.append((loss.detach().reshape(()), len(target)))
            self._scores.append((torch.as_tensor(total, dtype=torch.float64, device=loss.device), scored))

    def check(self) -> None:
        """Read the losses that were kept, and raise at the first that is not finite."""
        # One by one in Python: the same sum whenever, and in however many pieces, it is read.
        for value, n in _together(self._losses):
            self._take_loss(value, n)

    def read(self) -> None:
        """Take in what has come since the last time."""
        self.check()
        for total, n in _together(self._scores):
            self._take_score(total, n)
        _drain(self._monitor.forward, self._forward)
        _drain(self._monitor.backward, self._backward)

    def sums(self) -> list[float]:
        """All that is summed, so that it can be summed over processes too; `figures` reads it."""
        self.read()
        return [self._loss, self._samples, self._score, self._scored, *self._forward, *self._backward]

    def _take_loss(self, value: float, n: int) -> None:
        self._batches += 1
        if self._where is not None and not math.isfinite(value):
            batch = f"{value} in batch {self._batches} of {self._where}"
            raise NonFiniteLossError(str(wrong(self.who, "a finite loss", batch, self._advice)))
        self._loss += value * n
        self._samples += n

    def _take_score(self, total: float, n: int) -> None:
        self._score += total
        self._scored += n

    def _hits(self, pred: Any, target: Tensor) -> Tensor | None:
        """Whether each sample was classified right; None where the targets are no classes.

        A label that is no class is one that the loss leaves out, such as that of ``ignore_index``.
        """
        if binary(pred, target):
            if self._of_logits is None:
                assert self._loss_fn is not None
                self._of_logits = of_logits(self.who, self._loss_fn, pred, target)
            if not self._of_logits:
                return None
            if zeros_and_ones(target):
                return right(pred, target.reshape(-1))
            if is_integer(target):
                raise wrong(self.who, "labels 0 and 1 for one output", target.unique().tolist(), "Number them so.")
            return None
        classes = is_integer(target) and target.dtype != torch.bool and target.ndim == 1
        if not classes or not isinstance(pred, Tensor) or pred.shape[:-1] != target.shape:
            return None
        there = (target >= 0) & (target < pred.shape[1])
        return right(pred, target)[there]

    def _checked_score(self, pred: Any, target: Tensor) -> Tensor:
        assert self._metric is not None
        score = self._metric(pred, target)
        if not isinstance(score, Tensor) or score.shape != target.shape[:1]:
            got = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise wrong(
                self.who,
                f"metric(pred, target) of shape ({len(target)},)",
                got,
                "Give one value per sample.",
            )
        return score


def figures(sums: list[float]) -> dict[str, float | None]:
    """Means from `Meter.sums`; None where there was nothing to take a mean of."""
    loss, samples, score, scored, f_steps, f_solves, f_missed, b_steps, b_solves, b_missed = sums
    return {
        "loss": _mean(loss, samples),
        "acc": None if math.isnan(score) else _mean(score, scored),
        "forward_steps": _mean(f_steps, f_solves),
        "backward_steps": _mean(b_steps, b_solves),
        "missed": _mean(f_missed + b_missed, f_solves + b_solves),
    }


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _together(kept: list[tuple[Tensor, int]]) -> list[tuple[float, int]]:
    """What was kept, brought from the device at once, and let go."""
    if not kept:
        return []
    values = torch.stack([value for value, _ in kept]).tolist()
    counts = [n for _, n in kept]
    kept.clear()
    return list(zip(values, counts, strict=True))


def _drain(solves: list[Figures], into: list[int]) -> None:
    """Add up a monitor's figures and let them go: an epoch of them is not kept."""
    if solves:
        steps = torch.cat([figures.steps.reshape(-1) for figures in solves])
        converged = torch.cat([figures.converged.reshape(-1) for figures in solves])
        solves.clear()
        into[0] += int(steps.sum())
        into[1] += steps.numel()
        into[2] += int((~converged).sum())
