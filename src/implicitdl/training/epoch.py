"""One epoch after another: train, validate, keep."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .._internal.errors import wrong
from ..solution import ImplicitFunctionWarning
from .evaluate import Loss, evaluating, length_of, loss_of, measure, pair
from .logger import BEST, LAST, Logger, Row, save_weights, write_rows
from .meter import Meter, Metric, figures
from .processes import Processes, epoch_batches, move, seed_loader
from .progress import Bar, Board, Clock
from .run import Run


@dataclass
class Epochs:
    """One epoch after another."""

    run: Run
    place: Processes
    forward: nn.Module
    alone: nn.Module
    train_dl: Iterable[Any]
    valid_dl: Iterable[Any]
    loss_fn: Loss
    metric: Metric | None
    clip: float | None
    every_batch: bool
    logger: Logger
    board: Board
    bar: Bar

    def epoch(self, epoch: int) -> None:
        trained = self._train(epoch)
        row: Row = {"epoch": epoch, **trained, **self._validate(epoch)}
        row["lr"] = float(self.run.optimizer.param_groups[0]["lr"])
        if not self.every_batch:
            self._schedule(row["valid_loss"])
        self._keep(row)
        self.bar.end(row)
        if row["missed"] or row["valid_missed"]:
            warnings.warn(
                f"train: in epoch {epoch} {row['missed'] or 0:.2%} of the solves in training and "
                f"{row['valid_missed'] or 0:.2%} in validation did not reach the tolerance. "
                "Raise max_steps, or check that the map is a contraction.",
                ImplicitFunctionWarning,
                stacklevel=3,
            )

    def _train(self, epoch: int) -> Row:
        self.run.model.train()
        self.run.optimizer.zero_grad()
        self.bar.begin(epoch, length_of(self.train_dl))
        clock = Clock()
        with _one_warning_per_epoch(), self._meter(f"epoch {epoch}") as meter:
            batches = epoch_batches(self.train_dl, self.run.seed, epoch, self.place.rank)
            try:
                for done, batch in enumerate(batches, start=1):
                    inputs, target = (move(part, self.place.device) for part in pair("train", batch))
                    pred = self.forward(inputs)
                    loss = loss_of("train", self.loss_fn, pred, target)
                    meter.add(loss, pred, target)
                    self._step(loss)
                    if clock.due():
                        self.bar.show(done, figures(meter.sums()))
            except Exception:
                # On an accelerator a NaN loss shows first as whatever it breaks next: name it instead.
                meter.check()
                raise
            return self._found("train_dl", epoch, meter)

    def _step(self, loss: Tensor) -> None:
        optimizer, scaler = self.run.optimizer, self.place.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        if self.clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(held, self.clip)
        stepped = True
        if scaler is None:
            optimizer.step()
        else:
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            # The scale shrinks when the gradient overflowed and no step was taken.
            stepped = scaler.get_scale() >= before
        optimizer.zero_grad()
        if self.every_batch and stepped:
            self._schedule(loss.detach())

    def _schedule(self, loss: Any) -> None:
        scheduler = self.run.scheduler
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        elif scheduler is not None:
            scheduler.step()

    def _validate(self, epoch: int) -> Row:
        self.place.agree_buffers(self.run.model)
        meter = self._meter(f"the validation of epoch {epoch}")
        with _one_warning_per_epoch(), evaluating(self.run.model), meter:
            # Its own generator would be elsewhere after a resume.
            seed_loader(self.valid_dl, self.run.seed, epoch)
            measure(self.alone, self.valid_dl, self.loss_fn, self.place.device, meter)
            found = self._found("valid_dl", epoch, meter)
        return {
            "valid_loss": found["loss"],
            "valid_acc": found["acc"],
            "valid_steps": found["forward_steps"],
            "valid_missed": found["missed"],
        }

    def _keep(self, row: Row) -> None:
        """The best first: after a kill between the two, `last` leads to the epoch that writes it again."""
        self.run.rows.append(row)
        self.logger.rows.append(row)
        best = self.logger.judge(row, *verdict(row))
        if self.place.main:
            if best:
                save_weights(self.run.model, self.run.folder / BEST, row)
            self.run.save()
            write_rows(self.run.folder, self.run.rows)
        self.board.add(row)

    def _meter(self, where: str) -> Meter:
        advice = (
            "Lower the learning rate, clip the gradient (clip_grad_norm=1.0) or check the data; "
            f"{self.run.done} epochs are kept in '{self.run.folder / LAST}'."
        )
        return Meter("train", where, self.metric, advice, self.loss_fn)

    def _found(self, name: str, epoch: int, meter: Meter) -> Row:
        found = figures(self.place.sum(meter.sums()))
        if found["loss"] is None:
            do = "A generator runs dry after one epoch: give a DataLoader or a list."
            raise wrong("train", f"{name} with batches", f"none in epoch {epoch}", do)
        return dict(found)


def verdict(row: Row) -> tuple[str, bool]:
    """The figure that decides which epoch is the best, and whether smaller is better."""
    return ("valid_loss", True) if row["valid_acc"] is None else ("valid_acc", False)


@contextlib.contextmanager
def _one_warning_per_epoch() -> Iterator[None]:
    """A miss is shown by the bar and warned of once an epoch, not once a batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitFunctionWarning)
        yield
