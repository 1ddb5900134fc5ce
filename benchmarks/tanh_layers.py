"""The tutorial's dense models, 784 → 100 → x = tanh(Wx + u) → 10, by SGD: iteration, Newton, Newton implicitly.

    python benchmarks/tanh_layers.py

Ten epochs of Fashion-MNIST in batches of 100, at 0.1 and from the sixth epoch at 0.01, seed 0, as the tutorial has
it.  Steps are counted as there, per sample: evaluations of f, and of Newton's, which starts at tanh(u), all but the
last, which only finds the tolerance reached.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from timing import header
from torch import Tensor

from implicitdl import Adjoint, ImplicitAdjoint, Monitor, Newton, Picard, Solver, Unrolled
from implicitdl.data import load
from implicitdl.nn import DenseEquilibriumClassifier
from implicitdl.nn.starts import ComputedStart

RTOL, EPOCHS, LATE = 1e-4, 10, 5
LAYERS: dict[str, tuple[Solver, Adjoint]] = {
    "fixed-point iteration, unrolled": (Picard(rtol=RTOL), Unrolled()),
    "Newton, unrolled": (Newton(rtol=RTOL), Unrolled()),
    "Newton, implicit": (Newton(rtol=RTOL), ImplicitAdjoint()),
}


def epoch(model: torch.nn.Module, loader: object, opt: torch.optim.Optimizer | None) -> tuple[float, Monitor]:
    """Accuracy and the solves of one pass; with an optimiser it trains."""
    correct, count = 0, 0
    with Monitor() as monitor, torch.set_grad_enabled(opt is not None):
        for u, y in loader:  # type: ignore[attr-defined]
            scores: Tensor = model(u)
            if opt is not None:
                opt.zero_grad()
                F.cross_entropy(scores, y).backward()
                opt.step()
            correct += int((scores.argmax(1) == y).sum())
            count += len(y)
    return correct / count, monitor


def run(epochs: int = EPOCHS) -> None:
    data = load("fashion-mnist", batch_size=100, root=os.environ.get("IMPLICITDL_DATA"))
    print(f"\nDense tanh equilibria on Fashion-MNIST, SGD, {epochs} epochs, relative tolerance {RTOL:.0e}, seed 0")
    header("layer", "epoch", "training accuracy", "test accuracy", "steps in training", "steps in test", "missed")
    for name, (solver, adjoint) in LAYERS.items():
        torch.manual_seed(0)
        model = DenseEquilibriumClassifier(784, 10, 100, solver=solver, adjoint=adjoint)
        uncounted = 0
        if isinstance(solver, Newton):
            model.deq.start, uncounted = ComputedStart(torch.tanh), 1
        opt = torch.optim.SGD(model.parameters(), lr=1e-1)
        for number in range(1, epochs + 1):
            opt.param_groups[0]["lr"] = 1e-1 if number <= LATE else 1e-2
            training, made = epoch(model, data.train_dl, opt)
            test, tested = epoch(model, data.test_dl, None)
            print(
                f"| {name} | {number} | {training:.2%} | {test:.2%} | {made.forward_steps - uncounted:.2f} "
                f"| {tested.forward_steps - uncounted:.2f} | {made.missed:.3%} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(2)
    run()
