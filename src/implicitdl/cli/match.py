"""The work of `sim`: a teacher, its states, an implicit model, and what it is worth."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import activations
from .._internal.errors import takes, wrong
from ..data import Data, image_loader
from ..data import load as load_data
from ..sim import SIM, SIMReport, score
from ..sim.solvers import ADMMMultiGPUSolver
from ..sim.solvers.distributed import join
from ..solution import ImplicitFunctionWarning
from . import build, folder
from .outcome import Outcome
from .report import say
from .sim import DTYPES, SimOptions
from .teacher import WHO, load, split_seed

# Samples whose states are collected at a time, and how many are matched where nobody says.
_BATCH, _SAMPLES = 1000, 2000


def run(options: SimOptions, *, out: str | None, device: str | None, threads: int | None) -> None:
    """Match, test and report; everything that can be refused is refused before it takes time.

    Of several processes, each matches a share of the rows, and the first one tests, prints and writes.
    """
    place = build.device(WHO, device)
    build.threads(WHO, threads)
    main_process = int(os.environ.get("RANK", "0")) == 0
    where = _new_folder(options, out) if main_process else None
    teacher = load(options.teacher, options.layers, options.activation).to(place)
    options, data = _settled(options)
    loader = _samples(options, data)
    _try(teacher, loader)
    with _claimed(where, options):
        _join(options, place)
        with _quiet_unless(main_process):
            _match(options, place, teacher, data, loader, where)


def _match(
    options: SimOptions, place: torch.device, teacher: nn.Module, data: Data, loader: Any, where: Path | None
) -> None:
    sim = SIM(
        activations.BUILTIN[options.activation], options.kappa, device=place, dtype=DTYPES[options.dtype],
        rescale=options.rescale,
    )  # fmt: skip
    progress = where is not None and sys.stdout.isatty()
    report = sim.train(options.build_solver(), teacher, loader, progress=progress)
    outcome = None if where is None else _outcome(options, sim, report, teacher, data, where)
    lambdas, nonzeros = options.lambdas(), options.counts()
    if lambdas is not None or nonzeros is not None:
        points = sim.path(
            options.build_solver(), teacher, loader, lambdas=lambdas, nonzeros=nonzeros, refit=options.refit,
            progress=progress,
        )  # fmt: skip
        if outcome is not None:
            outcome.follow(points, teacher, loader, data)
    if outcome is not None:
        outcome.tell()


def _outcome(options: SimOptions, sim: SIM, report: SIMReport, teacher: nn.Module, data: Data, where: Path) -> Outcome:
    words = f"{report.samples:,} of {len(data.train_ds):,} samples matched, {len(data.test_ds):,} to test on"
    say(f"{options.data}: {words}")
    accuracy = {"teacher": score(teacher, data.test_dl), "sim": sim.evaluate(data.test_dl)}
    outcome = Outcome(where, options, report, accuracy)
    outcome.save(sim.model)
    return outcome


def _new_folder(options: SimOptions, out: str | None) -> Path:
    if out is None:
        return next(path for i in itertools.count(1) if not (path := Path(f"runs/sim-{options.data}-{i}")).exists())
    where = Path(out)
    if where.exists():
        raise wrong(WHO, "--out to be a new folder", f"'{where}', which is there", "Name another.")
    return where


def _settled(options: SimOptions) -> tuple[SimOptions, Data]:
    """With the seed of the split and the number of samples, where they were left open, and the data they say."""
    seed = split_seed(options.teacher) if options.split_seed is None else options.split_seed
    data = load_data(options.data, _BATCH, options.root, holdout=options.holdout, seed=seed)
    there = len(data.train_ds)
    samples = min(_SAMPLES, there) if options.samples is None else options.samples
    if samples > there:
        raise wrong(WHO, f"--samples of at most {there}", samples)
    return dataclasses.replace(options, split_seed=seed, samples=samples), data


def _samples(options: SimOptions, data: Data) -> Any:
    drawn = torch.randperm(len(data.train_ds), generator=torch.Generator().manual_seed(options.seed), device="cpu")
    return image_loader(data.train_ds.take(drawn[: options.samples]), _BATCH)


def _try(teacher: nn.Module, loader: Any) -> None:
    """A teacher that does not take the data shows before anything is computed or written."""
    images, _ = next(iter(loader))
    do = "Take the --data it was trained on; export it with a batch size that is free."
    with takes(WHO, "a teacher", images, do):
        score(teacher, [(images, torch.zeros(len(images), dtype=torch.long, device=images.device))])


def _claimed(where: Path | None, options: SimOptions) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if where is None else folder.claim(where, folder.SIM, options, folder.MODEL)


def _join(options: SimOptions, place: torch.device) -> None:
    """Under torchrun, the other processes: every solver deals its rows to those that have joined."""
    # That of several GPUs joins by itself, on the GPU that it takes.
    if not isinstance(options.build_solver(), ADMMMultiGPUSolver) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if place.type != "cpu":
            do = "Leave out --device: every process takes a GPU of its own."
            raise wrong(WHO, "--solver admm-multi-gpu for several processes on GPUs", options.solver, do)
        join(place)


@contextlib.contextmanager
def _quiet_unless(main_process: bool) -> Iterator[None]:
    """What there is to warn of, one process says."""
    with warnings.catch_warnings():
        if not main_process:
            warnings.simplefilter("ignore", ImplicitFunctionWarning)
        yield
