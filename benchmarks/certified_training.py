"""Fashion-MNIST: a standard and a certifiably trained implicit model of n = 100, and a robustly trained linear model.

The threat is |u' − u| ≤ ε for every pixel, with pixels in [0, 1] before and after.  Settings were chosen on a tenth of
the training data; here all of it is trained on, and the last epoch is tested.  The linear model is trained with the
same loss, which is exact for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import header
from torch import Tensor, nn

from implicitdl import ImplicitModel, StateSpace, certify
from implicitdl.data import Data, load

EPS, RADII = 0.05, (0.01, 0.05, 0.1)
N, BATCH, TEST_BATCH = 100, 256, 500
Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


class Linear(nn.Linear):
    """A linear classifier that knows its matrices."""

    def statespace(self) -> StateSpace:
        return StateSpace.affine(self.weight, self.bias)


def standard(model: nn.Module, u: Tensor, labels: Tensor, step: int) -> Tensor:
    return F.cross_entropy(model(u), labels)


def certified(steps: int) -> certify.CertifiedLoss:
    """Nothing but the bound: ε waits for a twentieth of the steps and grows for half of them."""
    return certify.CertifiedLoss(eps=EPS, wait=steps // 20, ramp=max(steps // 2, 1))


def trained(model: nn.Module, loss_of: Callable[[int], Loss], data: Data, epochs: int, lr: float) -> nn.Module:
    """Adam, with a rate that falls to 0 over the last two fifths of the steps."""
    u, labels = data.train_ds.pixels.flatten(1).float() / 255, data.train_ds.labels
    per_epoch = len(u) // BATCH
    steps = epochs * per_epoch
    loss = loss_of(steps)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (1 - step / steps) / 0.4))
    for epoch in range(epochs):
        order = torch.randperm(len(u))
        for batch in range(per_epoch):
            rows = order[batch * BATCH : (batch + 1) * BATCH]
            value = loss(model, u[rows], labels[rows], epoch * per_epoch + batch)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
    return model


def run(epochs: int, samples: int, seed: int) -> None:
    data = load("fashion-mnist", TEST_BATCH)
    u, labels = data.test_ds.pixels[:samples].flatten(1).float() / 255, data.test_ds.labels[:samples]
    batches = list(zip(u.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True))
    print(f"Fashion-MNIST, n = {N}, {epochs} epochs, ε = {EPS} in training, {samples:,} test images, seed {seed}")
    header("model", "ε", "clean %", "PGD-20 %", "certified %", "raw adjoint above interval %")
    for name, kind, loss_of, lr in (
        ("standard", ImplicitModel, lambda steps: standard, 1e-3),
        ("certified", ImplicitModel, certified, 2e-3),
        ("linear, robust", Linear, certified, 1e-3),
    ):
        torch.manual_seed(seed)
        model = Linear(784, 10) if kind is Linear else ImplicitModel(784, 10, N, bias=True, kappa=0.95)
        trained(model, loss_of, data, epochs, lr)
        for eps in RADII:
            found = certify.certified_accuracy(model, batches, eps, certify.Crown(), steps=20)
            print(
                f"| {name} | {eps} | {100 * found.clean:.2f} | {100 * found.attacked:.2f} "
                f"| {100 * found.certified:.2f} | {100 * found.lost:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--epochs", type=int, default=40)
    options.add_argument("--samples", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    run(given.epochs, given.samples, given.seed)
