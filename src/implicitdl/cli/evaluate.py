"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..solution import Monitor
from ..training import get_valid_accuracy
from . import build, folder
from .build import Model
from .options import Options


def run(run: str, root: str | None, device: str | None) -> None:
    who, path = "evaluate", Path(run)
    place = build.place(who, device)
    options = folder.read(who, path)
    model = folder.best(who, path, options).to(place)
    dtype = next(model.parameters()).dtype
    print_test_figures(
        model, ((u.to(dtype), labels) for u, labels in build.data(options, root).test_dl), place, options
    )


def print_test_figures(model: Model, loader: Any, device: torch.device, options: Options, training: str = "") -> None:
    """Print the figures of the test set, the accuracy last.

    The precision is that of the run, for whose tolerances its equilibria were trained.
    """
    with Monitor() as monitor:
        loss, accuracy = get_valid_accuracy(
            model, F.cross_entropy, loader, device,
            mixed_precision=options.precision,  # type: ignore[arg-type]
        )  # fmt: skip
    assert accuracy is not None  # the data sets are all of classes
    print(f"test loss: {loss:.4f}   steps per sample: {monitor.forward_steps:.1f}")
    print(f"missed the tolerance: {monitor.missed:.3%} of {monitor.samples:,} test samples{training}")
    print(f"test accuracy: {100 * accuracy:.2f} %", flush=True)
