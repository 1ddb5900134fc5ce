"""The public function: check the arguments, open the run, go through its epochs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from .._internal import store
from .._internal.errors import choice, non_negative_int, positive, positive_int, wrong
from .epoch import Epochs, verdict
from .evaluate import Loss, length_of
from .logger import Logger
from .meter import Metric
from .processes import Device, Precision, Processes, borrowed_streams, draw_seed, processes
from .progress import Bar, Board
from .run import Run, check_parameters, has_checkpoint, run_folder

Model = TypeVar("Model", bound=nn.Module)


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
    epochs = positive_int("train", "epochs", epochs)
    choice("train", "scheduler_step", scheduler_step, ("epoch", "batch"))
    if clip_grad_norm is not None:
        clip_grad_norm = positive("train", "clip_grad_norm", clip_grad_norm)
    if seed is not None:
        seed = non_negative_int("train", "seed", seed)
    for name, loader in (("train_dl", train_dl), ("valid_dl", valid_dl)):
        if length_of(loader) == 0:
            raise wrong("train", f"{name} with batches", "an empty one", "Check the data set and drop_last.")
    if isinstance(opt, torch.optim.LBFGS):
        raise wrong("train", "an optimizer that steps without a closure", "LBFGS", "Use Adam or SGD.")
    check_parameters(model, opt)
    if getattr(scheduler, "optimizer", opt) is not opt:
        raise wrong("train", "a scheduler of opt", "one of another optimizer", "Build it with opt.")
    folder = run_folder(dirname)
    drawn = draw_seed() if seed is None else seed
    with processes(device, mixed_precision) as place, borrowed_streams(place.device), _owner(folder, place):
        going_on = has_checkpoint(folder, resume)
        model.to(place.device)
        run = Run(folder, model, opt, scheduler, place.scaler, place.agree(drawn))
        if going_on:
            run.restore(seed, epochs)
        place.wait()  # Nobody writes before everybody has looked.
        if place.main and not going_on:
            run.save()
        logger = Logger(dir_name=folder if place.main else None, rows=run.rows)
        for row in run.rows:
            logger.judge(row, *verdict(row))
        forward, alone = place.wrap(model)
        shown = progress and place.main
        with Board(folder if place.main else None, run.done) as board, Bar(epochs, shown) as bar:
            loop = Epochs(
                run=run,
                place=place,
                forward=forward,
                alone=alone,
                train_dl=place.share(train_dl, even=True),
                valid_dl=place.share(valid_dl, even=False),
                loss_fn=loss_fn,
                metric=metric,
                clip=clip_grad_norm,
                every_batch=scheduler_step == "batch",
                logger=logger,
                board=board,
                bar=bar,
            )
            while run.done < epochs:
                loop.epoch(run.done + 1)
        place.wait()
    model.train()
    return model, logger


def _owner(folder: Path, place: Processes) -> contextlib.AbstractContextManager[None]:
    return store.owned(folder) if place.main else contextlib.nullcontext()
