"""SIM on the tutorial's problem: what the implicit model is worth, whole and sparse.

    IMPLICITDL_DATA=<folder with Fashion-MNIST> .venv-bench/bin/python benchmarks/sim_accuracy.py [--oracle]

The teacher is the tutorial's, 784-64-32-16-10 without biases, five epochs on Fashion-MNIST; SIM sees 2,000 random
training images.  At every number of nonzeros κ, and whether C and D are fitted to the model's own states, are chosen
by the accuracy on 10,000 training images that SIM does not see; the test accuracy is that of the choice.  With --oracle
the document's own solver runs too, for half an hour.  Draws docs/sim_sparsity.png.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fashion import images, tutorial_teacher
from timing import header
from torch import Tensor, nn

from implicitdl import ImplicitModel, StateSpace, prune, viz
from implicitdl.activations import RELU
from implicitdl.constraints import Unconstrained
from implicitdl.data import load
from implicitdl.sim import SIM, SIMWarning, score
from implicitdl.sim.solvers import ADMMSolver, BaseSolver, CVXSolver
from implicitdl.statespace import magnitude, refit, sensitivity
from implicitdl.statespace.prune import Scores

SAMPLES, HELD_OUT = 2000, 10_000
PENALTIES = (1e-6, 1e-4, 1e-2, 1.0)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)
# A smaller κ lets a row explain its z less by its own x, at a gain of 1/(1 − κ) for every error.
SETTINGS = [(kappa, regenerate) for kappa in (0.4, 0.7, 0.99) for regenerate in (False, True)]
RATIO = 0.1  # λ_y/λ_z: C is small beside B, and each of its weights counts more
FIGURE = Path(__file__).parents[1] / "docs" / "sim_sparsity.png"


def magnitude_by_layer(space: StateSpace, u: Tensor) -> Scores:
    """The rank of |w| in its layer, in (0, 1]: every layer keeps the same share, and none vanishes as a whole."""
    rows = (*space.sizes, space.q)  # a layer's weights are rows of [B, A], or of [D, C] for the last
    layers = torch.cat((torch.cat((space.B, space.A), 1), torch.cat((space.D, space.C), 1))).abs().split(rows)
    ranked = torch.cat([_ranks(layer) for layer in layers])
    (B, A), (D, C) = (part.split((space.p, space.n), 1) for part in ranked.split((space.n, space.q)))
    return A, B, C, D


def _ranks(size: Tensor) -> Tensor:
    """Of the entries that are not zero, among each other."""
    filled = size > 0
    ranks = torch.zeros_like(size)
    ranks[filled] = (size[filled].argsort().argsort() + 1).to(size) / filled.sum()
    return ranks


RULES = {
    "pruned by magnitude, refitted": magnitude,
    "pruned by magnitude in each layer, refitted": magnitude_by_layer,
    "pruned by sensitivity, refitted": sensitivity,
}

Accuracies = dict[str, list[tuple[float, float]]]  # name → (share of the teacher's nonzeros, test accuracy)


def matrices(net: nn.Sequential) -> StateSpace:
    """The teacher as one model, last layer first."""
    first, *rest = net[::2]
    space = StateSpace.affine(first.weight)
    for layer in rest:
        space = StateSpace.affine(layer.weight) @ StateSpace.elementwise(RELU, space.q, like=space.D) @ space
    return space.detach()


@dataclass
class Scene:
    """The teacher, the images that SIM sees, those to choose on, and the test set."""

    net: nn.Sequential
    space: StateSpace
    u: Tensor
    held: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]

    @property
    def nonzeros(self) -> int:
        return sum(int((M != 0).sum()) for M in self.space.matrices)

    def accuracies(self, model: nn.Module) -> tuple[float, float]:
        """On the held-out images and on the test set."""
        return score(model, self.held), score(model, self.test)


def scene(samples: int = SAMPLES, epochs: int = 5) -> Scene:
    u, y = images()
    test = load("fashion-mnist", 256).test_ds
    net = tutorial_teacher(u, y, epochs)
    order = torch.randperm(len(u), generator=torch.Generator().manual_seed(0))
    held = order[samples : samples + HELD_OUT]
    test_set = [(test.pixels.flatten(1).float() / 255, test.labels)]
    return Scene(net, matrices(net), u[order[:samples]], [(u[held], y[held])], test_set)


def whole(scene: Scene, oracle: bool) -> None:
    """Every penalty with the default solver, and the document's own call."""
    print(f"\nSIM from {len(scene.u):,} samples; the teacher has {scene.nonzeros:,} nonzeros\n")
    header("model", "solver", "held-out", "test", "‖A‖∞", "rows converged", "worst relative gap", "nonzeros")
    held, test = scene.accuracies(scene.net)
    print(f"| teacher | | {held:.2%} | {test:.2%} | | | | {scene.nonzeros:,} |")
    runs: list[tuple[bool, BaseSolver]] = [(True, ADMMSolver(lambda_z=lam, lambda_y=lam)) for lam in PENALTIES]
    runs += [(False, ADMMSolver())]
    if oracle:
        runs += [(rescale, CVXSolver(regen_states=True)) for rescale in (False, True)]
    for rescale, solver in runs:
        sim = SIM(rescale=rescale)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SIMWarning)  # the table says it
            report = sim.train(solver, scene.net, [scene.u])
        held, test = scene.accuracies(sim.model)
        rows = torch.cat([report.hidden.converged, report.output.converged])
        gap = max(float(part.relative_gap.max()) for part in (report.hidden, report.output))
        print(
            f"| SIM, {'rescaled' if rescale else 'states as they are'} | {named(solver)} | {held:.2%} | {test:.2%} "
            f"| {report.norm:.9f} | {int(rows.sum())} of {len(rows)} | {gap:.1e} | {report.nonzeros:,} |"
        )


def named(solver: Any) -> str:
    regenerated = ", regen_states" if solver.regen_states else ""
    return f"{type(solver).__name__}, λ = {solver.lambda_z:g}{regenerated}"


def sparse(scene: Scene, shares: tuple[float, ...] = SHARES) -> Accuracies:
    """Test accuracy at a share of the teacher's nonzeros: SIM, and the teacher pruned and refitted on the same data."""
    total = scene.nonzeros
    counts = [round(share * total) for share in shares]
    kinds = {"SIM": False, "SIM, refitted": True}
    curves: Accuracies = {name: [] for name in (*kinds, *RULES)}
    print("\nAt most so many of the teacher's nonzeros\n")
    header("nonzeros", "model", "κ", "C and D fitted to", "λ_z", "reached", "held-out", "test")
    found: dict[tuple[float, str], list[tuple[float, float, str, float]]] = {}
    for kappa, regenerate in SETTINGS:
        solver = ADMMSolver(lambda_z=1.0, lambda_y=RATIO, regen_states=regenerate)
        states = "own states" if regenerate else "the teacher's"
        for name, refitted in kinds.items():
            points = SIM(kappa=kappa).path(solver, scene.net, [scene.u], nonzeros=counts, refit=refitted)
            for share, point in zip(shares, points, strict=True):
                reached = point.report.nonzeros / total
                words = f"{kappa:g} | {states} | {point.lambda_z:.4g} | {reached:.1%}"
                found.setdefault((share, name), []).append((*scene.accuracies(point.model), words, reached))
    for share in shares:
        for name in kinds:
            held, test, words, reached = max(found[share, name])  # by the held-out accuracy
            print(f"| {share:.0%} | {name} | {words} | {held:.2%} | {test:.2%} |")
            curves[name].append((reached, test))
        for name, rule in RULES.items():
            pruning = prune(scene.space, scene.u, keep=share, by=rule)
            fitted = refit(pruning.space, scene.space, scene.u)
            held, test = scene.accuracies(ImplicitModel.from_statespace(fitted, constraint=Unconstrained))
            print(f"| {share:.0%} | {name} | | | | {pruning.kept / total:.1%} | {held:.2%} | {test:.2%} |")
            curves[name].append((pruning.kept / total, test))
    return curves


if __name__ == "__main__":
    problem = scene()
    whole(problem, "--oracle" in sys.argv)
    viz.sparsity(sparse(problem), of="test", reference=score(problem.net, problem.test), path=FIGURE)
