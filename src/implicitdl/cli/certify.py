"""The work of `certify`: what can be proved about a run's best checkpoint, and two pictures of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from .. import certify as certification
from .. import viz
from .._checks import choice, positive_int, wrong
from ..nn import ImplicitModel
from . import build, folder
from .report import say

WHO = "certify"
RADII = (0.01, 0.05, 0.1)
METHODS = ("crown", "interval", "sensitivity")


def certify(
    run: str,
    eps: Sequence[float],
    samples: int,
    method: str,
    slope_steps: int,
    rounds: int,
    attack_steps: int,
    restarts: int,
    root: str | None,
    device: str | None,
) -> None:
    choice(WHO, "--method", method, METHODS)
    positive_int(WHO, "--samples", samples)
    if method != "crown" and (slope_steps or rounds):
        raise wrong(
            WHO, "--slope-steps and --rounds with --method crown alone", f"--method {method}", "Leave them out."
        )
    path = Path(run)
    place = build.device(WHO, device)
    options = folder.read(WHO, path)
    model = folder.best(WHO, path, options)
    if not isinstance(model, ImplicitModel):
        raise wrong(WHO, "a run of --model implicit", options.model, "Only its equation is known in matrices.")
    model = model.to(place)
    data = build.data(options, root)
    by = {
        "crown": certification.Crown(steps=slope_steps, rounds=rounds),
        "interval": certification.Interval(),
        "sensitivity": certification.Sensitivity(),
    }[method]
    say(str(certification.well_posed(model)))
    say(
        f"Lipschitz constants: {certification.lipschitz_inf(model):.4g} in the ∞-norm, "
        f"{certification.lipschitz_two(model):.4g} in the 2-norm"
    )
    found = []
    for radius in sorted(eps):
        found.append(
            certification.certified_accuracy(
                model, _first(data.test_dl, samples), radius, by, steps=attack_steps, restarts=restarts
            )
        )
        say(str(found[-1]))
    pictures = path / "plots"
    viz.robust_accuracy(found, path=pictures / "robust.png")
    viz.pixel_sensitivity(model, data.test_ds.shape, path=pictures / "sensitivity.png")
    for name in ("robust", "sensitivity"):
        say(str(pictures / f"{name}.png"))


def _first(loader: object, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader up to so many samples."""
    for u, labels in loader:  # type: ignore[attr-defined]
        yield u[:samples], labels[:samples]
        samples -= len(u)
        if samples <= 0:
            return
