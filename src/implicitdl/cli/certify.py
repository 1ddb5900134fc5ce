"""The command `certify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import certify as certification
from .. import viz
from .._internal.errors import ArgumentError, wrong
from ..data import Data
from ..nn import ImplicitModel
from . import build, folder
from .options import CertifyOptions

RADII = (0.01, 0.05, 0.1)
_UNKNOWN = "unknown"


def run(run: str, options: CertifyOptions, root: str | None, device: str | None) -> None:
    who, path = options.WHO, Path(run)
    place = build.place(who, device)
    saved = folder.read(who, path)
    model = folder.best(who, path, saved)
    if not isinstance(model, ImplicitModel):
        raise wrong(who, "a run of --model implicit", saved.model, "Only its equation is known in matrices.")
    model = model.to(place)
    data = build.data(saved, root)
    print(certification.well_posed(model))
    box, two = _constant(certification.lipschitz_inf, model), _constant(certification.lipschitz_two, model)
    print(f"Lipschitz constants: {box} in the ∞-norm, {two} in the 2-norm", flush=True)
    radii = sorted(options.eps or RADII)
    attack: dict[str, Any] = {"steps": options.attack_steps, "restarts": options.restarts}
    if box == _UNKNOWN:
        print("certified accuracy: unknown, because box bounds need λ_pf(max|φ'||A|) < 1; what an attack leaves:")
        exact = model.double()
        for radius in radii:
            batches = _first(data, options.samples, exact.B)
            print(certification.attacked_accuracy(exact, batches, radius, **attack), flush=True)
        return
    by = {
        "crown": certification.Crown(steps=options.slope_steps, rounds=options.rounds),
        "interval": certification.Interval(),
        "sensitivity": certification.Sensitivity(),
    }[options.method]
    found = []
    for radius in radii:
        batches = _first(data, options.samples, model.B)
        found.append(certification.certified_accuracy(model, batches, radius, by, **attack))
        print(found[-1], flush=True)
    robust, sensitivity = path / "plots" / "robust.png", path / "plots" / "sensitivity.png"
    viz.robust_accuracy(found, path=robust)
    viz.pixel_sensitivity(model, data.test_ds.shape, path=sensitivity)
    print(f"{robust}\n{sensitivity}")


def _constant(bound: Callable[[ImplicitModel], float], model: ImplicitModel) -> str:
    """A Lipschitz constant in words; unknown where the bound does not apply."""
    try:
        return f"{bound(model):.4g}"
    except ArgumentError:
        return _UNKNOWN


def _first(data: Data, samples: int, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the test set up to so many samples, flat, where the model is and in its dtype."""
    for u, labels in data.test_dl:
        yield u[:samples].flatten(1).to(like), labels[:samples].to(like.device)
        samples -= len(u)
        if samples <= 0:
            return
