"""The training loop: `train` opens a run, and goes through its epochs."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .._internal import store
from .._internal.errors import choice, non_negative_int, positive, positive_int, wrong
from ..solution import ImplicitFunctionWarning
from .evaluate import Forward, Loss, Metric, Metrics, evaluating, on_device
from .logger import (
    BEST,
    LAST,
    Logger,
    in_words,
    progress_bar,
    refuse_run,
    save_weights,
    tensorboard,
    write_rows,
)
from .processes import Device, Precision, epoch_batches, processes, seed_loader, share
from .state import TrainState

Model = TypeVar("Model", bound=nn.Module)

# Seconds between two looks at the figures: every look waits for the device, and an eye follows a few a second.
_PAUSE = 0.25


def train(
    model: Model,
    train_dl: Iterable[Any],
    valid_dl: Iterable[Any],
    opt: Optimizer,
    loss_fn: Loss,
    epochs: int,
    dirname: str | os.PathLike[str],
    device: Device | None = None,
    *,
    scheduler: Any = None,
    scheduler_step: Literal["epoch", "batch"] = "epoch",
    clip_grad_norm: float | None = None,
    mixed_precision: Precision | None = None,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = True,
    metric: Metric | None = None,
) -> tuple[Model, Logger]:
    """Train a model, keep its best and its last state, and write down every figure.

    A run is a folder::

        dirname/last            model, optimiser, scheduler and rows after the last finished epoch
        dirname/best            the weights with the best validation accuracy (or loss, without classes)
        dirname/metrics.csv     one row per epoch, and the same as metrics.jsonl
        dirname/tensorboard     where TensorBoard is installed

    A run that was killed, at any moment, goes on with ``resume=True`` and on the CPU ends with the very
    numbers of an undisturbed one. What an unfinished epoch did is not kept: it is done again. Batch order and
    dropout come from (seed, epoch): at the start of each epoch torch's, Python's and numpy's global streams
    and the loaders' own generators are seeded anew; the global streams are put back at the end. What neither
    a state_dict nor the seed holds (the random transforms of ``persistent_workers=True``, plain attributes)
    is not restored.

    The scheduler, like the optimiser, comes back with the settings it was saved with: a longer run that
    resumes a finished one goes on along the saved schedule, not along one planned for the new length.

    Under ``torchrun`` (or ``accelerate launch``, which on CPUs starts only one process) each process takes
    its share of the batches, so that a step sees processes × batch size samples; the folder is on a disk that
    all of them see, and the main one writes to it.

    Arguments:
        model: called as ``model(input)``; moved to the device in place.
        train_dl: batches (input, target); a DataLoader or, on one process, what can be iterated again.
        valid_dl: the same, for validation after each epoch.
        opt: over the model's parameters.
        loss_fn: ``loss_fn(pred, target)``, the mean over the batch.
        epochs: how many in all, those of a resumed run included.
        dirname: the run's folder, made if missing. A relative path is under the current directory.
        device: such as "cuda:1"; None takes what accelerate finds.
        scheduler: a learning rate scheduler of `opt`; ReduceLROnPlateau gets the validation loss.
        scheduler_step: whether it steps after each epoch or after each batch.
        clip_grad_norm: the largest 2-norm of the whole gradient; None leaves it.
        mixed_precision: "bf16", "fp16" (GPU only) or "no"; None takes what ``accelerate launch`` was given.
        resume: go on with the run in `dirname`; where there is none yet, start it.
        seed: of batch order and dropout; None draws one number from torch's global stream. Kept with the run.
        progress: show a bar and a line per epoch.
        metric: ``metric(pred, target)`` of shape (batch,), larger is better, in place of the accuracy. By
            default the accuracy, as `get_valid_accuracy` has it.

    Returns:
        ``(model, logger)``: the model with its *last* weights, in training mode, and the record:
        ``logger.rows`` has one dict per epoch and ``logger.best`` is the row of the best.
        `load_weights(model, dirname + "/best")` loads the best weights. The names in a row: epoch (from 1);
        loss and acc over the training batches, as they were met; valid_loss, valid_acc; forward_steps and
        backward_steps, evaluations per sample and solve in training; missed, the share of these solves that
        missed the tolerance; valid_steps and valid_missed, the same of validation; lr, of the first parameter
        group. Accuracies and shares are in [0, 1]; None stands where there is nothing to measure.

    Raises:
        ArgumentError: a bad argument, a folder that holds a run while resume is False, a checkpoint of
            another model, optimiser or scheduler, or one that only a pickle could write.
        CheckpointError: another run is writing to the folder.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint stays.
        CheckpointError: the folder cannot be written or read; the last checkpoint stays.

    Example:
        >>> import tempfile, torch
        >>> _ = torch.manual_seed(0)
        >>> u = torch.randn(64, 2)
        >>> data = torch.utils.data.TensorDataset(u, (u[:, 0] > u[:, 1]).long())
        >>> loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
        >>> model = torch.nn.Linear(2, 2)
        >>> opt = torch.optim.Adam(model.parameters(), lr=0.1)
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model, logger = train(model, loader, loader, opt, loss_fn, 9, folder + "/run", progress=False)
        >>> len(logger.rows), logger.best["valid_acc"] > 0.9
        (9, True)
    """
    if not isinstance(dirname, (str, os.PathLike)) or not os.fspath(dirname):
        raise wrong("train", "dirname to be a path", repr(dirname), "Name the folder of this run.")
    folder = Path(dirname)
    epochs = positive_int("train", "epochs", epochs)
    choice("train", "scheduler_step", scheduler_step, ("epoch", "batch"))
    clip = None if clip_grad_norm is None else positive("train", "clip_grad_norm", clip_grad_norm)
    if seed is not None:
        seed = non_negative_int("train", "seed", seed)
    for name, loader in (("train_dl", train_dl), ("valid_dl", valid_dl)):
        if _length(loader) == 0:
            raise wrong("train", f"{name} with batches", "an empty one", "Check the data set and drop_last.")
    if isinstance(opt, torch.optim.LBFGS):
        raise wrong("train", "an optimizer that steps without a closure", "LBFGS", "Use Adam or SGD.")
    if getattr(scheduler, "optimizer", opt) is not opt:
        raise wrong("train", "a scheduler of opt", "one of another optimizer", "Build it with opt.")
    parameters = [parameter for group in opt.param_groups for parameter in group["params"]]
    if strange := len({*parameters} - {*model.parameters()}):  # a checkpoint holds the model's, and would lose it
        expected, do = "an optimizer over the model's parameters", "Build it with model.parameters()"
        got = f"{strange} of {len(parameters)} that the model does not have"
        raise wrong("train", expected, got, f"{do}; a loss with weights goes into the model.")
    # One number from torch's global stream, so that torch.manual_seed decides it.
    drawn = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed

    with contextlib.ExitStack() as opened:
        # The run: where it computes, its folder, its state, and its record.
        accelerator, place = opened.enter_context(processes(device, mixed_precision))
        main, several = accelerator.is_main_process, accelerator.num_processes > 1
        if main:
            opened.enter_context(store.owned(folder))
        going_on = resume and store.exists(folder / LAST)
        if not going_on:  # A run writes `last` first: figures or a `best` without it belong to something else.
            do = f"It has no '{LAST}' to resume: give" if resume else "Pass resume=True to go on with it, or"
            refuse_run("train", folder, f"{do} another dirname.")
        model.to(place)
        shared = torch.tensor(drawn, dtype=torch.int64, device=place)
        if several:
            torch.distributed.broadcast(shared, 0)  # the main process's seed
        state = TrainState(folder, model, opt, scheduler, accelerator.scaler, int(shared))
        if going_on:
            state.restore(seed, epochs)
        accelerator.wait_for_everyone()  # Nobody writes before everybody has looked.
        if main and not going_on:
            state.save()
        logger = Logger(dir_name=folder if main else None, rows=state.rows)
        state.rows = logger.rows
        for row in logger.rows:
            logger.judge(row, "valid_loss" if row["valid_acc"] is None else "valid_acc")
        board = opened.enter_context(tensorboard(folder if main else None, len(logger.rows)))
        bar = opened.enter_context(progress_bar(progress and main))
        train_dl, valid_dl = share(accelerator, train_dl, even=True), share(accelerator, valid_dl, even=False)
        # Training averages the gradients of the processes. Validation does without, as they may have fewer batches.
        alone = Forward(model)
        forward = accelerator.prepare_model(alone)
        scaler = accelerator.scaler or torch.amp.GradScaler(place.type, enabled=False)
        plateau = isinstance(scheduler, ReduceLROnPlateau)

        for epoch in range(len(logger.rows) + 1, epochs + 1):
            advice = (
                "Lower the learning rate, clip the gradient (clip_grad_norm=1.0) or check the data; "
                f"{epoch - 1} epochs are kept in '{folder / LAST}'."
            )
            with warnings.catch_warnings():
                # A solve that missed its tolerance is warned of once an epoch, below, and not once a batch.
                warnings.simplefilter("ignore", ImplicitFunctionWarning)

                # Train.
                model.train()
                opt.zero_grad()
                task = bar.add_task(f"epoch {epoch}/{epochs}", total=_length(train_dl), figures="") if bar else None
                look = time.monotonic() + _PAUSE
                metrics = Metrics("train", loss_fn, metric, f"epoch {epoch}", advice)
                with metrics:
                    batches = epoch_batches(train_dl, state.seed, epoch, accelerator.process_index)
                    for done, batch in enumerate(batches, start=1):
                        inputs, target = on_device("train", batch, place)
                        loss = metrics.loss(forward(inputs), target)
                        scaler.scale(loss).backward()
                        if clip is not None:
                            scaler.unscale_(opt)
                            nn.utils.clip_grad_norm_(parameters, clip)
                        scale = scaler.get_scale()
                        scaler.step(opt)
                        scaler.update()
                        opt.zero_grad()
                        # The scale shrinks when the gradient overflowed and no step was taken.
                        if scheduler is not None and scheduler_step == "batch" and scaler.get_scale() >= scale:
                            scheduler.step(*[loss.detach()] if plateau else [])
                        if time.monotonic() >= look:
                            figures = metrics.figures()
                            if bar:
                                bar.update(task, completed=done, figures=in_words(figures), refresh=True)
                            look = time.monotonic() + _PAUSE
                row = {"epoch": epoch, **metrics.means("train_dl", place if several else None)}

                # Validate.
                if several:  # Batch statistics differ, and the main process's are saved.
                    for buffer in model.buffers():
                        torch.distributed.broadcast(buffer, 0)
                metrics = Metrics("train", loss_fn, metric, f"the validation of epoch {epoch}", advice)
                with metrics, evaluating(model):
                    seed_loader(valid_dl, state.seed, epoch)  # its own generator would be elsewhere after a resume
                    for batch in valid_dl:
                        inputs, target = on_device("train", batch, place)
                        metrics.loss(alone(inputs), target)
                found = metrics.means("valid_dl", place if several else None)
            row |= {"valid_loss": found["loss"], "valid_acc": found["acc"]}
            row |= {"valid_steps": found["forward_steps"], "valid_missed": found["missed"]}
            row["lr"] = float(opt.param_groups[0]["lr"])
            if scheduler is not None and scheduler_step == "epoch":
                scheduler.step(*[row["valid_loss"]] if plateau else [])

            # Keep. The best first: after a kill between the two, `last` leads to the epoch that writes it again.
            logger.rows.append(row)
            best = logger.judge(row, "valid_loss" if row["valid_acc"] is None else "valid_acc")
            if main:
                if best:
                    save_weights(model, folder / BEST, row)
                state.save()
                write_rows(folder, logger.rows)
            if board:
                for name, value in row.items():
                    if name != "epoch" and value is not None:
                        board.add_scalar(name, value, epoch)
                board.flush()
            if bar:
                bar.remove_task(task)
                bar.console.print(f"epoch {epoch}/{epochs}  {in_words(row)}")
            if row["missed"] or row["valid_missed"]:
                warnings.warn(
                    f"train: in epoch {epoch} {row['missed'] or 0:.2%} of the solves in training and "
                    f"{row['valid_missed'] or 0:.2%} in validation did not reach the tolerance. "
                    "Raise max_steps, or check that the map is a contraction.",
                    ImplicitFunctionWarning,
                    stacklevel=2,
                )
        accelerator.wait_for_everyone()
    model.train()
    return model, logger


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a generator, or a loader of an iterable data set
        return None
