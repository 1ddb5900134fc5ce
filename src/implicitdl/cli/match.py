"""The work of `sim`: a teacher, its states, an implicit model, and what it is worth."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _store, activations, viz
from .._checks import extra, positive_int, wrong
from ..constraints import Unconstrained
from ..data import Data, image_loader
from ..data import load as load_data
from ..nn import ImplicitModel
from ..sim import SIM, PathPoint, SIMReport, score
from ..statespace import prune, refit
from . import build
from .report import say
from .sim import DTYPES, SimOptions
from .teacher import WHO, load, statespace, weights_of

# Samples whose states are collected at a time.
_BATCH = 1000


def run(options: SimOptions, *, root: str | None, out: str | None, device: str | None, threads: int | None) -> None:
    place = build.device(WHO, device)
    if threads is not None:
        torch.set_num_threads(positive_int(WHO, "--threads", threads))
    where = _new_folder(options, out)
    data = load_data(options.data, _BATCH, root, holdout=options.holdout, seed=options.seed)
    teacher = load(options.teacher, options.layers, options.activation).to(place)
    loader = _samples(options, data)
    _try(teacher, loader)
    sim = SIM(
        activations.BUILTIN[options.activation], options.kappa, device=place, dtype=DTYPES[options.dtype],
        rescale=options.rescale,
    )  # fmt: skip
    report = sim.train(options.build_solver(), teacher, loader, progress=sys.stdout.isatty())
    matched = f"{report.samples:,} of {len(data.train_ds):,} samples matched"
    say(f"{options.data}: {matched}, {len(data.test_ds):,} to test on")
    figures = {"teacher": score(teacher, data.test_dl), "sim": sim.evaluate(data.test_dl)}
    sim.model.save_pretrained(where / "model")
    drawn = where / "plots"
    viz.spy(sim.model, magnitude=True, path=drawn / "spy.png")
    viz.row_gaps(report, path=drawn / "gaps.png")
    curve: list[dict[str, Any]] = []
    if (lambdas := options.lambdas()) is not None:
        points = sim.path(
            options.build_solver(), teacher, loader, lambdas=lambdas, refit=options.refit, progress=sys.stdout.isatty()
        )  # fmt: skip
        curve = _curve(points, teacher, loader, data)
        _draw(curve, score(teacher, data.valid_dl), teacher, drawn / "sparsity.png")
    _write(where, options, report, figures, curve)
    _table(report, figures, curve)
    say(f"model, figures and plots: {where}")
    say(f"test accuracy: {100 * figures['sim']:.2f} %")


def _new_folder(options: SimOptions, out: str | None) -> Path:
    if out is None:
        return next(path for i in itertools.count(1) if not (path := Path(f"runs/sim-{options.data}-{i}")).exists())
    where = Path(out)
    if where.exists():
        raise wrong(WHO, "--out to be a new folder", f"'{where}', which is there", "Name another.")
    return where


def _samples(options: SimOptions, data: Data) -> Any:
    if options.samples > len(data.train_ds):
        raise wrong(WHO, f"--samples of at most {len(data.train_ds)}", options.samples)
    drawn = torch.randperm(len(data.train_ds), generator=torch.Generator().manual_seed(options.seed))
    return image_loader(data.train_ds.take(drawn[: options.samples]), _BATCH)


def _try(teacher: nn.Module, loader: Any) -> None:
    """A teacher that does not take the data shows before anything is computed or written."""
    images, _ = next(iter(loader))
    try:
        score(teacher, [(images, torch.zeros(len(images), dtype=torch.long))])
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise wrong(
            WHO, f"a teacher that takes inputs of shape {tuple(images.shape)}", f"one that does not ({reason})",
            "Take the --data it was trained on; export it with a batch size that is free.",
        ) from error  # fmt: skip


def _curve(points: Sequence[PathPoint], teacher: nn.Module, loader: Any, data: Data) -> list[dict[str, Any]]:
    """Held-out accuracy along the path, and of the teacher pruned by magnitude to as many weights and refitted."""
    rows = []
    space = statespace(teacher)
    u = torch.cat([images for images, _ in loader])
    for point in points:
        count = point.report.nonzeros
        row = {"lambda_z": point.lambda_z, "nonzeros": count, "accuracy": score(point.model, data.valid_dl)}
        if space is not None and 0 < count < (total := weights_of(teacher)):
            there = u.to(space.A)
            fitted = refit(prune(space, there, keep=count / total).space, space, there)
            row["pruned"] = score(ImplicitModel.from_statespace(fitted, constraint=Unconstrained), data.valid_dl)
        rows.append(row)
    return rows


def _draw(curve: list[dict[str, Any]], reference: float, teacher: nn.Module, path: Path) -> None:
    total = weights_of(teacher)
    names = {"accuracy": "SIM", "pruned": "pruned by magnitude, refitted"}
    curves = {
        name: [(row["nonzeros"] / total, row[key]) for row in curve if row["nonzeros"] and key in row]
        for key, name in names.items()
    }
    viz.sparsity({name: points for name, points in curves.items() if points}, reference=reference, path=path)


def _write(
    where: Path, options: SimOptions, report: SIMReport, figures: dict[str, float], curve: list[dict[str, Any]]
) -> None:
    rows = {
        name: {
            "objective": part.objective.tolist(), "relative_gap": part.relative_gap.tolist(),
            "norm": part.norm.tolist(), "support": part.support.tolist(),
        }
        for name, part in (("hidden", report.hidden), ("output", report.output))
    }  # fmt: skip
    content = {
        "implicitdl": version("implicitdl"), "options": dataclasses.asdict(options), "accuracy": figures,
        "norm": report.norm, "nonzeros": report.nonzeros, "path": curve, "rows": rows,
    }  # fmt: skip
    # A gap that is not known is infinite, which JSON has no word for but null.
    text = json.dumps(content, indent=1).replace("Infinity", "null")
    _store.write_file(where / "sim.json", (text + "\n").encode())


def _table(report: SIMReport, figures: dict[str, float], curve: list[dict[str, Any]]) -> None:
    rich = extra("rich.table", "cli")
    console = extra("rich.console", "cli").Console(highlight=False, soft_wrap=True)
    facts = rich.Table(show_header=False)
    for name, value in (
        ("teacher, test accuracy", f"{figures['teacher']:.2%}"),
        ("implicit model, test accuracy", f"{figures['sim']:.2%}"),
        *report.facts(),
    ):
        facts.add_row(name, value)
    console.print(facts)
    if curve:
        table = rich.Table("λ_z", "nonzeros", "held-out accuracy", "pruned, refitted")
        for row in curve:
            pruned = f"{row['pruned']:.2%}" if "pruned" in row else "—"
            table.add_row(f"{row['lambda_z']:g}", f"{row['nonzeros']:,}", f"{row['accuracy']:.2%}", pruned)
        console.print(table)
