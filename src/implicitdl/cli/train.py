"""The command `train`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..nn import pretrained
from ..solution import ImplicitFunctionWarning
from ..training import train
from . import build, evaluate, folder
from .options import Options, RunInterruptedError


def run(
    options: Options,
    given: Mapping[str, Any],
    *,
    out: str | None,
    resume: bool,
    device: str | None,
    threads: int | None,
) -> None:
    """Train, then test the best checkpoint. Everything that can be refused is refused before a file is written."""
    who = options.WHO
    if resume:
        dirname, options = folder.resumed(given, options, out)
    else:
        dirname = folder.new(options, out)
    # The launcher says its precision once. The run, its test and its resumption take it from the options.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    options = dataclasses.replace(options, precision=options.precision or launched).check()
    build.place(who, device, threads)
    data = build.data(options)
    torch.manual_seed(options.seed)
    model = build.model(options, data.train_ds.shape, data.output_dim)
    with warnings.catch_warnings():  # options that do not fit together show in one step on one sample
        warnings.simplefilter("ignore", ImplicitFunctionWarning)
        u, y = data.train_ds[0]
        F.cross_entropy(model(u.unsqueeze(0)), torch.tensor([y], dtype=torch.int64, device=u.device)).backward()
        model.zero_grad()
    main_process = folder.is_main_process()
    if main_process:
        sizes = f"{len(data.train_ds):,} to train on, {len(data.valid_ds):,} held out"
        print(f"{options.data}: {sizes}, {len(data.test_ds):,} to test on")
        print(f"{type(model).__name__}: {build.sizes(model)}, {build.count(model)} parameters")
        print(f"run: {dirname}", flush=True)
    opt = build.optimizer(options, model.parameters())
    steps = options.epochs * math.ceil(len(data.train_dl) / int(os.environ.get("WORLD_SIZE", "1")))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, build.Schedule(options.schedule, steps, options.warmup))
    loss_fn = build.loss(options, model)
    try:
        claim = folder.claim(dirname, folder.FILE, options, folder.LAST, model=pretrained.config(model))
        with claim if main_process else contextlib.nullcontext():
            _, logger = train(
                model,
                data.train_dl,
                data.valid_dl,
                opt,
                loss_fn,
                options.epochs,
                dirname,
                device,
                scheduler=schedule,
                scheduler_step="batch",
                clip_grad_norm=options.clip,
                mixed_precision=options.precision,  # type: ignore[arg-type]
                resume=resume,
                seed=options.seed,
            )
    except KeyboardInterrupt:
        again = f"implicitdl train --resume --out {dirname}"
        raise RunInterruptedError(f"interrupted; go on with: {again}") from None
    if main_process:
        place = next(model.parameters()).device
        best = folder.best(who, dirname, options).to(place)
        rows: list[dict[str, Any]] = logger.rows
        epoch = max(rows, key=lambda row: row["valid_acc"])["epoch"]  # the first of equals
        print(f"best epoch: {epoch} of {len(rows)}, chosen on {len(data.valid_ds):,} held-out samples")
        missed = sum(row["missed"] or 0.0 for row in rows) / len(rows)
        evaluate.print_test_figures(best, data.test_dl, place, options, f", {missed:.3%} of the solves in training")
