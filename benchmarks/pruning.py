"""A trained model pruned to a tenth of its weights: accuracy after pruning, after least squares, after fine-tuning.

    python benchmarks/pruning.py [epochs] [hidden_dim]

Weights are those of A, B, C and D; biases are neither counted nor pruned.  Training ends with its last weights, nothing
is chosen, and accuracies are those on the test images.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import header
from torch import Tensor, nn

from implicitdl import ImplicitModel, get_valid_accuracy, prune, train
from implicitdl.data import Data, load
from implicitdl.statespace import (
    StateSpace,
    error_bound,
    magnitude,
    reduce,
    refit,
    sensitivity,
    within_each,
    zeros_held,
)

RULES = {
    "magnitude": magnitude,
    "sensitivity": sensitivity,
    "error_bound within each matrix": within_each(error_bound),
}
KEEP, FINE_TUNING, SEED = 0.1, 2, 0
BATCH, LR, FINE_LR = 64, 3e-3, 1e-3
# What training needs.
TOLERANCES = {"tol": 1e-3, "grad_tol": 1e-2}
# Images that the rules and the least squares look at; the bound is reported on the first hundred of them.
LOOKED_AT, BOUNDED = 10_000, 100


def trained(model: ImplicitModel, data: Data, epochs: int, lr: float) -> ImplicitModel:
    """By the library's own `train`, with Adam and a cosine schedule; the last weights."""
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(data.train_dl))
    with tempfile.TemporaryDirectory() as folder:
        train(
            model, data.train_dl, data.valid_dl, optimiser, nn.CrossEntropyLoss(label_smoothing=0.1), epochs,
            Path(folder) / "run", scheduler=schedule, scheduler_step="batch", seed=SEED,
            progress=False,
        )  # fmt: skip
    return model


def accuracy(space: StateSpace, data: Data) -> float:
    """On the test images."""
    _, found = get_valid_accuracy(_Module(space), F.cross_entropy, data.test_dl, "cpu")
    assert found is not None
    return found


class _Module(nn.Module):
    def __init__(self, space: StateSpace) -> None:
        super().__init__()
        self.space = space

    def forward(self, u: Tensor) -> Tensor:
        return self.space(u)


def run(epochs: int = 10, n: int = 300) -> None:
    data = load("fashion-mnist", BATCH, holdout=0.1)
    torch.manual_seed(SEED)
    model = ImplicitModel(data.input_dim, data.output_dim, n, bias=True, **TOLERANCES)
    dense = trained(model, data, epochs, LR).statespace().detach()
    u = data.train_ds.pixels[:LOOKED_AT].flatten(1).to(dense.dtype) / data.train_ds.white
    full = accuracy(dense, data)
    print(f"\nFashion-MNIST, n = {n}, {epochs} epochs, seed {SEED}: {full:.2%} with all weights; {KEEP:.0%} kept")
    header("rule", "kept of A, B, C, D", "pruned", "least squares", f"fine-tuned, {FINE_TUNING} epochs", "lost, points",
           "wanted", "states after reduce", "reduced − masked, relative", f"bound on |y − y'|, mean of {BOUNDED}",
           "measured, mean")  # fmt: skip
    for name, rule in RULES.items():
        pruning = prune(dense, u, keep=KEEP, by=rule)
        masked = pruning.space
        fitted = refit(masked, dense, u)
        tuned = ImplicitModel.from_statespace(fitted, solver=model.solver, adjoint=model.adjoint)
        with zeros_held(tuned):
            trained(tuned, data, FINE_TUNING, FINE_LR)
        last = tuned.statespace().detach()
        # Compared in float64, where both are solved far beyond the digits of the weights.
        exact, some = last.to(torch.float64), u[:BOUNDED]
        small = reduce(exact)
        gap = (small(u.double()) - exact(u.double())).norm() / exact(u.double()).norm()
        measured = (dense(some) - masked(some)).abs().mean()
        kept = [int((M != 0).sum()) for M in last.matrices]
        after = accuracy(last, data)
        print(
            f"| {name} | {sum(kept):,} of {pruning.total:,} {kept} | {accuracy(masked, data):.2%} "
            f"| {accuracy(fitted, data):.2%} | {after:.2%} | {100 * (full - after):+.2f} | ≤ 1 | {small.n} of {n} "
            f"| {gap:.1e} | {pruning.output_bound[:BOUNDED].mean():.3g} | {measured:.3g} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(2)
    run(*map(int, sys.argv[1:]))
