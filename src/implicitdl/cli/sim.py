"""The command `sim`: match a teacher, and write what was found."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import viz
from .._internal.errors import takes, wrong
from ..activations import BUILTIN
from ..constraints import Unconstrained
from ..data import Data, image_loader, load
from ..nn import ImplicitModel
from ..sim import SIM, PathPoint, SIMReport, score
from ..sim.solvers import (
    ADMMMultiGPUSolver,
    ADMMSolver,
    BaseSolver,
    CVXSolver,
    LeastSquareSolver,
    OneSidedSolver,
    PenalisedSolver,
    ProjectedGDLowRankSolver,
)
from ..sim.solvers.distributed import join
from ..solution import ImplicitFunctionWarning
from ..statespace import prune, refit
from . import build, folder, teacher
from .options import SIM_SOLVERS, SimOptions, flag
from .tables import print_table

WHO = SimOptions.WHO
_CLASSES: tuple[type[BaseSolver], ...] = (
    ADMMSolver, ADMMMultiGPUSolver, CVXSolver, OneSidedSolver, ProjectedGDLowRankSolver, LeastSquareSolver,
)  # fmt: skip
_SOLVERS = dict(zip(SIM_SOLVERS, _CLASSES, strict=True))
# Samples whose states are collected at a time, and the number that is matched by default.
_BATCH, _SAMPLES = 1000, 2000


def run(options: SimOptions, *, out: str | None, device: str | None, threads: int | None) -> None:
    """Match, test and report. Everything that can be refused is refused before it takes time.

    Of several processes, each matches a share of the rows, and the first one tests, prints and writes.
    """
    solver = _solver(options)
    place = build.place(WHO, device, threads)
    main_process = folder.is_main_process()
    where = _new_folder(options, out) if main_process else None
    model = teacher.load(options.teacher, options.layers, options.activation).to(place)
    options, data = _settled(options)
    # The same draw for every device, and not that of the split: the test set is not what the teacher was trained on.
    drawn = torch.randperm(len(data.train_ds), generator=torch.Generator().manual_seed(options.seed), device="cpu")
    loader = image_loader(data.train_ds.take(drawn[: options.samples]), _BATCH)
    _try(model, loader)
    claim = contextlib.nullcontext() if where is None else folder.claim(where, folder.SIM, options, folder.MODEL)
    with claim, warnings.catch_warnings():
        # Under torchrun every solver deals its rows to the processes that have joined. That of several GPUs joins by
        # itself, on the GPU that it takes.
        if not isinstance(solver, ADMMMultiGPUSolver) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if place.type != "cpu":
                do = "Leave out --device: every process takes a GPU of its own."
                raise wrong(WHO, "--solver admm-multi-gpu for several processes on GPUs", options.solver, do)
            join(place)
        if not main_process:  # one process says what there is to warn of
            warnings.simplefilter("ignore", ImplicitFunctionWarning)
        progress = main_process and sys.stdout.isatty()
        sim = SIM(
            BUILTIN[options.activation], options.kappa, device=place, dtype=getattr(torch, options.dtype),
            rescale=options.rescale,
        )  # fmt: skip
        report = sim.train(solver, model, loader, progress=progress)
        if where is not None:
            words = f"{report.samples:,} of {len(data.train_ds):,} samples matched, {len(data.test_ds):,} to test on"
            print(f"{options.data}: {words}", flush=True)
            accuracy = {"teacher": score(model, data.test_dl), "sim": sim.evaluate(data.test_dl)}
            assert sim.model is not None
            sim.model.save_pretrained(where / folder.MODEL)
            viz.spy(sim.model, magnitude=True, path=where / "plots" / "spy.png")
            viz.row_gaps(report, path=where / "plots" / "gaps.png")
            _write(where, options, report, accuracy, [])
        path: list[dict[str, Any]] = []
        lambdas, counts = options.lambdas(), options.counts()
        if lambdas is not None or counts is not None:
            points = sim.path(
                solver, model, loader, lambdas=lambdas, nonzeros=counts, refit=options.refit, progress=progress
            )
            if where is not None:
                path = _follow(where, options, points, model, loader, data)
                _write(where, options, report, accuracy, path)
        if where is not None:
            _tell(where, options, report, accuracy, path)


def _solver(options: SimOptions) -> BaseSolver:
    """The solver with the options that were given. It refuses those that it does not have."""
    kind = _SOLVERS[options.solver]
    names = ("lambda_z", "lambda_y", "rank", "regen_states")
    given = {name: value for name in names if (value := getattr(options, name)) not in (None, False)}
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in given.keys() - known:
        raise wrong(WHO, f"a --solver with {flag(name)}", options.solver, f"Leave out {flag(name)}.")
    solver = kind(**given)
    if not isinstance(solver, PenalisedSolver) and (options.path is not None or options.nonzeros is not None):
        expected, do = "a --solver with penalties for --path or --nonzeros", "Take admm, or leave them out."
        raise wrong(WHO, expected, options.solver, do)
    return solver


def _new_folder(options: SimOptions, out: str | None) -> Path:
    if out is None:
        return next(path for i in itertools.count(1) if not (path := Path(f"runs/sim-{options.data}-{i}")).exists())
    where = Path(out)
    if where.exists():
        raise wrong(WHO, "--out to be a new folder", f"'{where}', which is there", "Name another.")
    return where


def _settled(options: SimOptions) -> tuple[SimOptions, Data]:
    """The options with the seed of the split and the number of samples filled in, and the data."""
    seed = teacher.split_seed(options.teacher) if options.split_seed is None else options.split_seed
    data = load(options.data, _BATCH, options.root, holdout=options.holdout, seed=seed)
    there = len(data.train_ds)
    samples = min(_SAMPLES, there) if options.samples is None else options.samples
    if samples > there:
        raise wrong(WHO, f"--samples of at most {there}", samples)
    return dataclasses.replace(options, split_seed=seed, samples=samples), data


def _try(model: nn.Module, loader: Any) -> None:
    """A teacher that does not take the data shows before anything is computed or written."""
    images, _ = next(iter(loader))
    do = "Take the --data it was trained on; export it with a batch size that is free."
    with takes(WHO, "a teacher", images, do):
        score(model, [(images, torch.zeros(len(images), dtype=torch.long, device=images.device))])


def _follow(
    where: Path, options: SimOptions, points: Sequence[PathPoint], model: nn.Module, loader: Any, data: Data
) -> list[dict[str, Any]]:
    """Held-out accuracy along a path, and of the teacher pruned by magnitude to as many weights; and its picture.

    Both are refitted, or neither.
    """
    u = torch.cat([images for images, _ in loader])
    space, total = teacher.statespace(model, u[:2]), teacher.weights_of(model)
    path: list[dict[str, Any]] = []
    for point in points:
        count = point.report.nonzeros
        row = {"lambda_z": point.lambda_z, "nonzeros": count, "accuracy": score(point.model, data.valid_dl)}
        if space is not None and 0 < count < total:
            same = u.to(space.A)
            left = prune(space, same, keep=count / total).space
            left = refit(left, space, same) if options.refit else left
            pruned = ImplicitModel.from_statespace(left, constraint=Unconstrained)
            row["pruned"] = score(pruned, data.valid_dl)
        path.append(row)
    curves = {
        name: [(row["nonzeros"] / total, row[key]) for row in path if row["nonzeros"] and key in row]
        for key, name in _names(options).items()
    }
    curves = {name: points for name, points in curves.items() if points}
    if curves:  # none is left where λ was too large
        reference = score(model, data.valid_dl)
        viz.sparsity(curves, reference=reference, of="held-out", path=where / "plots" / "sparsity.png")
    return path


def _names(options: SimOptions) -> dict[str, str]:
    """The curves of a path, by their key in its rows."""
    also = ", refitted" if options.refit else ""
    return {"accuracy": f"SIM{also}", "pruned": f"pruned by magnitude{also}"}


def _facts(options: SimOptions, report: SIMReport, accuracy: dict[str, float]) -> dict[str, str]:
    return {
        "data": f"{options.data}, {report.samples:,} samples matched",
        "teacher, test accuracy": f"{accuracy['teacher']:.2%}",
        "implicit model, test accuracy": f"{accuracy['sim']:.2%}",
        **dict(report.facts()),
    }


def _write(
    where: Path, options: SimOptions, report: SIMReport, accuracy: dict[str, float], path: list[dict[str, Any]]
) -> None:
    """Write sim.json. JSON has no infinity, which stands for an objective or a gap that is not known."""

    def known(values: torch.Tensor) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in values.tolist()]

    rows = {
        name: {
            "objective": known(part.objective), "relative_gap": known(part.relative_gap),
            "norm": part.norm.tolist(), "support": part.support.tolist(),
        }
        for name, part in (("hidden", report.hidden), ("output", report.output))
    }  # fmt: skip
    folder.write(
        where / folder.SIM, options, facts=_facts(options, report, accuracy), accuracy=accuracy, norm=report.norm,
        nonzeros=report.nonzeros, path=path, rows=rows,
    )  # fmt: skip


def _tell(
    where: Path, options: SimOptions, report: SIMReport, accuracy: dict[str, float], path: list[dict[str, Any]]
) -> None:
    print_table(_facts(options, report, accuracy).items(), show_header=False)
    if path:
        rows = [
            (
                f"{row['lambda_z']:g}", f"{row['nonzeros']:,}", f"{row['accuracy']:.2%}",
                f"{row['pruned']:.2%}" if "pruned" in row else "—",
            )
            for row in path
        ]  # fmt: skip
        names = (f"{name}, held-out accuracy" for name in _names(options).values())
        print_table(rows, "λ_z", "nonzeros", *names)
    print(f"model, figures and plots: {where}")
    print(f"test accuracy: {100 * accuracy['sim']:.2f} %", flush=True)
