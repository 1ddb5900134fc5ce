"""The work of `evaluate`, `plot` and `info`: what a run's best checkpoint is and does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import viz
from .._checks import extra
from ..data import image_loader
from ..nn import ImplicitModel
from ..solution import Monitor
from ..training import get_valid_accuracy
from . import build, folder

# Enough for quantiles that no single sample moves; the traces of more would only take longer.
_PLOTTED = 256


class Measured(NamedTuple):
    """A model on a set of samples."""

    loss: float
    accuracy: float
    steps: float
    missed: float
    samples: int


def measured(model: ImplicitModel, loader: Any, device: torch.device) -> Measured:
    with Monitor() as monitor:
        loss, accuracy = get_valid_accuracy(model, F.cross_entropy, loader, device)
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
    model = folder.best(who, Path(run)).to(place)
    say_figures(measured(model, build.data(options, root).test_dl, place))


def plot(run: str, root: str | None) -> None:
    who = "plot"
    path = Path(run)
    options = folder.read(who, path)
    model = folder.best(who, path)
    rows = folder.rows(who, path)
    u, y = next(iter(image_loader(build.data(options, root).test_ds, _PLOTTED)))
    pictures = path / "plots"
    viz.training_curves(rows, path=pictures / "training.png")
    _residuals(model, u, y, pictures / "residuals.png")
    viz.spy(model, magnitude=True, path=pictures / "spy.png")
    viz.spectrum(model, path=pictures / "spectrum.png")
    for name in ("training", "residuals", "spy", "spectrum"):
        say(str(pictures / f"{name}.png"))


def _residuals(model: ImplicitModel, u: Tensor, y: Tensor, path: Path) -> None:
    solution = model.solve(u, trace=True)
    assert isinstance(solution.value, Tensor)
    F.cross_entropy(model.read_out(solution.value, u.flatten(1)), y).backward()
    viz.residuals(solution, rtol=model.solver.tolerance(solution.value.dtype), path=path)


def info(run: str) -> None:
    who = "info"
    path = Path(run)
    options = folder.read(who, path)
    model = folder.best(who, path)
    rows = folder.rows(who, path)
    table = extra("rich.table", "cli").Table(title=str(path), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in _facts(model, options.data, rows):
        table.add_row(name, value)
    extra("rich.console", "cli").Console(highlight=False, soft_wrap=True).print(table)


def _facts(model: ImplicitModel, data: str, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    A = viz.constrained(model)
    found = viz.spectral_figures(A)
    best = max(rows, key=lambda row: row["valid_acc"])
    bound = model.constraint
    structure = f"rank {model.rank}" if model.rank else "strictly upper triangular" if bound.triangular else "dense"
    return [
        ("data", f"{data}, best of {len(rows)} epochs: {best['epoch']}, held-out accuracy {best['valid_acc']:.2%}"),
        ("sizes", f"n = {model.hidden_dim}, p = {model.input_dim}, q = {model.output_dim}"),
        ("A", f"{structure}, {type(bound).__name__}"),
        ("φ", f"{model.activation.name}, max|φ'| = {model.activation.lipschitz:.6g}"),
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("κ", f"{bound.kappa:g}"),
        ("‖A‖∞", f"{found.norm:.6f}"),
        ("λ_pf(|A|)", f"{found.perron:.6f}   in [{found.perron_low:.6f}, {found.perron_high:.6f}]"),
        ("ρ(A)", f"{found.radius:.6f}"),
        ("forward steps", _steps(best["forward_steps"], best["valid_steps"])),
        ("backward steps", _steps(best["backward_steps"], None)),
        ("missed", f"{best['missed'] or 0:.3%} of the solves in training"),
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
