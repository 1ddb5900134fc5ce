"""The command `info`."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import viz
from ..kernels.backend import backend
from ..nn import ImplicitModel
from . import build, folder
from .tables import print_table


def run(run: str) -> None:
    who, path = "info", Path(run)
    options = folder.read(who, path)
    model = folder.best(who, path, options)
    if folder.is_sim(path):
        facts = folder.matched(who, path)
    else:
        rows = folder.rows(who, path)
        best = max(rows, key=lambda row: row["valid_acc"])
        epoch = f"best of {len(rows)} epochs: {best['epoch']}, held-out accuracy {best['valid_acc']:.2%}"
        validation = "" if best["valid_steps"] is None else f", {best['valid_steps']:.1f} in validation"
        facts = {
            "data": f"{options.data}, {epoch}",
            "forward steps": _steps(best["forward_steps"], validation),
            "backward steps": _steps(best["backward_steps"]),
            "missed": f"{best['missed'] or 0:.3%} of the solves in training",
        }
    facts["model"], facts["sizes"] = type(model).__name__, build.sizes(model)
    facts["parameters"] = build.count(model)
    if isinstance(model, ImplicitModel):
        facts |= _facts_of_matrices(model)
    way = backend()
    facts["loops"] = f"{way.way}: {way.why}"
    print_table(facts.items(), title=str(path), show_header=False, title_justify="left")


def _steps(training: float | None, rest: str = "") -> str:
    """Mean evaluations per sample; None where an adjoint makes no solve of its own."""
    return "none" if training is None else f"{training:.1f} per sample{rest}"


def _facts_of_matrices(model: ImplicitModel) -> dict[str, str]:
    A = viz.constrained(model)
    found = viz.spectral_figures(A)
    bound = model.constraint
    structure = f"rank {model.rank}" if model.rank else "strictly upper triangular" if bound.triangular else "dense"
    facts = {
        "A": f"{structure}, {bound}",
        "φ": f"{model.activation.name}, max|φ'| = {model.activation.lipschitz:.6g}",
        "‖A‖∞": f"{found.norm:.6f}",
        "λ_pf(|A|)": f"{found.perron:.6f}   in [{found.perron_low:.6f}, {found.perron_high:.6f}]",
        "ρ(A)": f"{found.radius:.6f}",
    }
    # A after its constraint, because it is the projection that makes it sparse.
    blocks = {"A": torch.from_numpy(A), "B": model.B, "C": model.C, "D": model.D}
    if model.rank:
        blocks |= dict(zip("LR", model.weights(), strict=True))
    for name, block in blocks.items():
        words = "not there"
        if block is not None:
            count = int((block != 0).sum())
            words = f"{count:,} of {block.numel():,}, sparsity {1 - count / block.numel():.2%}"
        facts[f"{name} nonzero"] = words
    return facts
