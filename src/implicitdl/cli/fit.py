"""The work of `train`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..data import Data
from ..solution import ImplicitFunctionWarning
from ..training import train
from . import build, folder, models, report
from .models import Model
from .options import WHO, Options


class RunInterruptedError(Exception):
    """Ctrl-C during a run, with the words to go on with it."""


def run(
    options: Options,
    given: Mapping[str, Any],
    *,
    out: str | None,
    resume: bool,
    device: str | None,
    threads: int | None,
) -> None:
    """Train, then test the best checkpoint.  Everything that can be refused is refused before a file is written."""
    if resume:
        dirname, options = folder.resumed(given, options, out)
    else:
        dirname = folder.new(options, out)
    # What launched this says it once; the run, its test and whoever resumes it go by the options.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    options = dataclasses.replace(options, precision=options.precision or launched).check()
    if device is not None:
        build.device(WHO, device)
    build.threads(WHO, threads)
    data = build.data(options)
    torch.manual_seed(options.seed)
    model = models.model(options, data.train_ds.shape, data.output_dim)
    _try_one_step(model, data)
    main_process = int(os.environ.get("RANK", "0")) == 0
    if main_process:
        report.say(_opening(data, options, model, dirname))
    claim = folder.claimed(dirname, options, model) if main_process else contextlib.nullcontext()
    try:
        with claim:
            rows = _train(options, model, data, dirname, device, resume)
    except KeyboardInterrupt:
        raise RunInterruptedError(f"interrupted; go on with: implicitdl train --resume --out {dirname}") from None
    if main_process:
        place = next(model.parameters()).device
        best = folder.best(WHO, dirname, options).to(place)
        missed = sum(row["missed"] or 0.0 for row in rows) / len(rows)
        report.say(f"best epoch: {_best_epoch(rows)} of {len(rows)}, chosen on {len(data.valid_ds):,} held-out samples")
        report.say_figures(report.measured(best, data.test_dl, place, options), training=missed)


def _train(
    options: Options, model: Model, data: Data, dirname: Path, device: str | None, resume: bool
) -> list[dict[str, Any]]:
    opt = build.optimizer(options, model.parameters())
    loss_fn = build.loss(options, model)
    batches = math.ceil(len(data.train_dl) / int(os.environ.get("WORLD_SIZE", "1")))
    _, logger = train(
        model,
        data.train_dl,
        data.valid_dl,
        opt,
        loss_fn,
        options.epochs,
        dirname,
        device,
        scheduler=build.scheduler(options, opt, options.epochs * batches),
        scheduler_step="batch",
        clip_grad_norm=options.clip,
        mixed_precision=options.precision,  # type: ignore[arg-type]
        resume=resume,
        seed=options.seed,
    )
    return logger.rows


def _try_one_step(model: Model, data: Data) -> None:
    """Forward and backward on one sample: settings that do not fit together show before a folder is made."""
    u, y = data.train_ds[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitFunctionWarning)  # the run itself will say it
        F.cross_entropy(model(u.unsqueeze(0)), torch.tensor([y], dtype=torch.int64, device=u.device)).backward()
    model.zero_grad()


def _opening(data: Data, options: Options, model: Model, dirname: Path) -> str:
    sizes = f"{len(data.train_ds):,} to train on, {len(data.valid_ds):,} held out, {len(data.test_ds):,} to test on"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{options.data}: {sizes}\n"
        f"{type(model).__name__}: {report.sizes(model)}, {parameters:,} parameters\n"
        f"run: {dirname}"
    )


def _best_epoch(rows: list[dict[str, Any]]) -> int:
    return int(max(rows, key=lambda row: row["valid_acc"])["epoch"])  # max keeps the first of equals, as train does
