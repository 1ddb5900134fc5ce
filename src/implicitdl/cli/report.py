"""The work of `evaluate`, `plot` and `info`: what a run's best checkpoint is and does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import viz
from .._internal.errors import extra, wrong
from ..data import image_loader
from ..kernels.backend import backend
from ..nn import DenseEquilibriumClassifier, ImplicitModel
from ..solution import Monitor, Report, Solution
from ..training import get_valid_accuracy
from ..training.evaluate import autocast
from . import build, folder
from .models import Model
from .options import Options

# Enough for quantiles that no single sample moves; the traces of more would only take longer.
_PLOTTED = 256


class Measured(NamedTuple):
    """A model on a set of samples."""

    loss: float
    accuracy: float
    steps: float
    missed: float
    samples: int


def measured(model: Model, loader: Any, device: torch.device, options: Options) -> Measured:
    """The figures in the precision of the run, whose tolerances its equilibria were trained for."""
    with Monitor() as monitor:
        loss, accuracy = get_valid_accuracy(
            model, F.cross_entropy, loader, device,
            mixed_precision=options.precision,  # type: ignore[arg-type]
        )  # fmt: skip
    assert accuracy is not None  # the datasets are all of classes
    return Measured(loss, accuracy, monitor.forward_steps, monitor.missed, monitor.samples)


def say(text: str) -> None:
    print(text, flush=True)


def say_figures(found: Measured, training: float | None = None) -> None:
    """The figures of the test; the accuracy is the last line."""
    also = "" if training is None else f", {training:.3%} of the solves in training"
    say(f"test loss: {found.loss:.4f}   steps per sample: {found.steps:.1f}")
    say(f"missed the tolerance: {found.missed:.3%} of {found.samples:,} test samples{also}")
    say(f"test accuracy: {100 * found.accuracy:.2f} %")


def evaluate(run: str, root: str | None, device: str | None) -> None:
    who = "evaluate"
    place = build.device(who, device)
    options = folder.read(who, Path(run))
    model = folder.best(who, Path(run), options).to(place)
    dtype = next(model.parameters()).dtype
    batches = ((u.to(dtype), labels) for u, labels in build.data(options, root).test_dl)
    say_figures(measured(model, batches, place, options))


def plot(run: str, root: str | None) -> None:
    who = "plot"
    path = Path(run)
    if folder.is_sim(path):
        raise wrong(who, "a run of `train`", "one of `sim`", f"Its pictures are in '{path / 'plots'}' already.")
    options = folder.read(who, path)
    model = folder.best(who, path, options)
    rows = folder.rows(who, path)
    u, y = next(iter(image_loader(build.data(options, root).test_ds, _PLOTTED)))
    pictures = path / "plots"
    drawn = ["training", "residuals"]
    viz.training_curves(rows, path=pictures / "training.png")
    with autocast(u.device, options.precision):  # type: ignore[arg-type]
        _residuals(model, u, y, pictures / "residuals.png")
    if isinstance(model, ImplicitModel):
        viz.spy(model, magnitude=True, path=pictures / "spy.png")
        viz.spectrum(model, path=pictures / "spectrum.png")
        drawn += ["spy", "spectrum"]
    for name in drawn:
        say(str(pictures / f"{name}.png"))


def _residuals(model: Model, u: Tensor, y: Tensor, path: Path) -> None:
    found: Solution | Report
    if isinstance(model, ImplicitModel):
        found = model.solve(u, trace=True)
        assert isinstance(found.value, Tensor)
        scores = model.read_out(found.value, u.flatten(1))
    else:
        model.deq.trace = True
        scores = model.eval()(u)
        assert model.deq.stats is not None
        found = model.deq.stats
    F.cross_entropy(scores, y).backward()
    viz.residuals(found, rtol=model.solver.tolerance(scores.dtype), path=path)


def info(run: str) -> None:
    who = "info"
    path = Path(run)
    options = folder.read(who, path)
    model = folder.best(who, path, options)
    found = dict(_facts(model))
    if folder.is_sim(path):
        found = folder.matched(who, path) | found
    else:
        found = _facts_of_training(options.data, folder.rows(who, path)) | found
    way = backend()
    found["loops"] = f"{way.way}: {way.why}"
    table = extra("rich.table", "cli").Table(title=str(path), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in found.items():
        table.add_row(name, value)
    extra("rich.console", "cli").Console(highlight=False, soft_wrap=True).print(table)


def sizes(model: Model) -> str:
    if isinstance(model, (ImplicitModel, DenseEquilibriumClassifier)):
        return f"n = {model.hidden_dim}, p = {model.input_dim}, q = {model.output_dim}"
    return ", ".join(f"{name} = {getattr(model, name)}" for name in model.saved_arguments if name != "on_failure")


def _facts_of_training(data: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    best = max(rows, key=lambda row: row["valid_acc"])
    return {
        "data": f"{data}, best of {len(rows)} epochs: {best['epoch']}, held-out accuracy {best['valid_acc']:.2%}",
        "forward steps": _steps(best["forward_steps"], best["valid_steps"]),
        "backward steps": _steps(best["backward_steps"], None),
        "missed": f"{best['missed'] or 0:.3%} of the solves in training",
    }


def _facts(model: Model) -> list[tuple[str, str]]:
    return [
        ("model", type(model).__name__),
        ("sizes", sizes(model)),
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        *(_facts_of_A(model) if isinstance(model, ImplicitModel) else ()),
    ]


def _facts_of_A(model: ImplicitModel) -> list[tuple[str, str]]:
    A = viz.constrained(model)
    found = viz.spectral_figures(A)
    bound = model.constraint
    structure = f"rank {model.rank}" if model.rank else "strictly upper triangular" if bound.triangular else "dense"
    return [
        ("A", f"{structure}, {bound}"),
        ("φ", f"{model.activation.name}, max|φ'| = {model.activation.lipschitz:.6g}"),
        ("‖A‖∞", f"{found.norm:.6f}"),
        ("λ_pf(|A|)", f"{found.perron:.6f}   in [{found.perron_low:.6f}, {found.perron_high:.6f}]"),
        ("ρ(A)", f"{found.radius:.6f}"),
        *((f"{name} nonzero", words) for name, words in _sparsity(model, A)),
    ]


def _steps(training: float | None, validation: float | None) -> str:
    """Mean evaluations per sample; None where an adjoint makes no solve of its own."""
    if training is None:
        return "none"
    return f"{training:.1f} per sample" + ("" if validation is None else f", {validation:.1f} in validation")


def _sparsity(model: ImplicitModel, A: Any) -> list[tuple[str, str]]:
    """Entries that are not zero; of A after its constraint, which is what the projection makes sparse."""
    blocks: list[tuple[str, Any]] = [("A", torch.from_numpy(A)), ("B", model.B), ("C", model.C), ("D", model.D)]
    if model.rank:
        blocks[1:1] = list(zip("LR", model.weights(), strict=True))
    words = []
    for name, block in blocks:
        if block is None:
            words.append((name, "not there"))
            continue
        count = int((block != 0).sum())
        words.append((name, f"{count:,} of {block.numel():,}, sparsity {1 - count / block.numel():.2%}"))
    return words
