"""The work of `certify`: what can be proved about a run's best checkpoint, and two pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import certify as certification
from .. import viz
from .._internal.errors import ArgumentError, choice, non_negative, non_negative_int, positive_int, wrong
from ..data import Data
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
    _check(eps, samples, method, slope_steps, rounds, attack_steps, restarts)
    path = Path(run)
    place = build.device(WHO, device)
    options = folder.read(WHO, path)
    model = folder.best(WHO, path, options)
    if not isinstance(model, ImplicitModel):
        raise wrong(WHO, "a run of --model implicit", options.model, "Only its equation is known in matrices.")
    model = model.to(place)
    data = build.data(options, root)
    say(str(certification.well_posed(model)))
    by_box, by_two = (_known(bound, model) for bound in (certification.lipschitz_inf, certification.lipschitz_two))
    say(f"Lipschitz constants: {_words(by_box)} in the ∞-norm, {_words(by_two)} in the 2-norm")
    attack: dict[str, Any] = {"steps": attack_steps, "restarts": restarts}
    if by_box is None:
        say("certified accuracy: unknown, because box bounds need λ_pf(max|φ'||A|) < 1; what an attack leaves:")
        exact = model.double()
        for radius in sorted(eps):
            say(str(certification.attacked_accuracy(exact, _first(data, samples, exact.B), radius, **attack)))
        return
    by = {
        "crown": certification.Crown(steps=slope_steps, rounds=rounds),
        "interval": certification.Interval(),
        "sensitivity": certification.Sensitivity(),
    }[method]
    found = []
    for radius in sorted(eps):
        batches = _first(data, samples, model.B)
        found.append(certification.certified_accuracy(model, batches, radius, by, **attack))
        say(str(found[-1]))
    pictures = path / "plots"
    viz.robust_accuracy(found, path=pictures / "robust.png")
    viz.pixel_sensitivity(model, data.test_ds.shape, path=pictures / "sensitivity.png")
    for name in ("robust", "sensitivity"):
        say(str(pictures / f"{name}.png"))


def _check(
    eps: Sequence[float], samples: int, method: str, slope_steps: int, rounds: int, attack_steps: int, restarts: int
) -> None:
    """At the door: before anything is read, and before the proofs, which take their time."""
    for radius in eps:
        non_negative(WHO, "--eps", radius)
    choice(WHO, "--method", method, METHODS)
    for name, count in (("samples", samples), ("attack-steps", attack_steps), ("restarts", restarts)):
        positive_int(WHO, f"--{name}", count)
    for name, count in (("slope-steps", slope_steps), ("rounds", rounds)):
        if non_negative_int(WHO, f"--{name}", count) and method != "crown":
            raise wrong(WHO, f"--{name} with --method crown alone", f"--method {method}", "Leave it out.")


def _known(bound: Callable[[ImplicitModel], float], model: ImplicitModel) -> float | None:
    """The Lipschitz constant, where the bound applies."""
    try:
        return bound(model)
    except ArgumentError:
        return None


def _words(constant: float | None) -> str:
    return "unknown" if constant is None else f"{constant:.4g}"


def _first(data: Data, samples: int, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the test set up to so many samples, flat, where the model is and in its dtype."""
    for u, labels in data.test_dl:
        yield u[:samples].flatten(1).to(like), labels[:samples].to(like.device)
        samples -= len(u)
        if samples <= 0:
            return
