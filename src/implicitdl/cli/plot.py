"""The command `plot`."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from .. import viz
from .._internal.errors import wrong
from ..data import image_loader
from ..nn import ImplicitModel
from ..solution import Report, Solution
from ..training.evaluate import autocast
from . import build, folder

# Enough for quantiles that no single sample moves; the traces of more would only take longer.
_SAMPLES = 256


def run(run: str, root: str | None) -> None:
    who, path = "plot", Path(run)
    if folder.is_sim(path):
        raise wrong(who, "a run of `train`", "one of `sim`", f"Its pictures are in '{path / 'plots'}' already.")
    options = folder.read(who, path)
    model = folder.best(who, path, options)
    rows = folder.rows(who, path)
    u, y = next(iter(image_loader(build.data(options, root).test_ds, _SAMPLES)))
    pictures = path / "plots"
    drawn = ["training", "residuals"]
    viz.training_curves(rows, path=pictures / "training.png")
    with autocast(u.device, options.precision):  # type: ignore[arg-type]
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
        F.cross_entropy(scores, y).backward()  # the backward solve has residuals too
        viz.residuals(found, rtol=model.solver.tolerance(scores.dtype), path=pictures / "residuals.png")
    if isinstance(model, ImplicitModel):
        viz.spy(model, magnitude=True, path=pictures / "spy.png")
        viz.spectrum(model, path=pictures / "spectrum.png")
        drawn += ["spy", "spectrum"]
    for name in drawn:
        print(pictures / f"{name}.png")
