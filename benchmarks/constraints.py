"""Which map onto the ∞-norm ball trains better: the measurement behind the default of `ImplicitFunctionInf`."""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from fashion import images
from timing import header

from implicitdl import ImplicitModel, Monitor
from implicitdl.constraints import Constraint, RowProjection, RowScaling, SoftRowScaling

N, BATCH, EPOCHS, SEEDS = 100, 128, 5, (0, 1, 2)


def accuracy(
    kind: type[Constraint], seed: int, lr: float, u: torch.Tensor, y: torch.Tensor
) -> tuple[float, float, float]:
    """Held-out accuracy, last training loss, and mean forward steps; a cosine schedule, 10,000 images held out."""
    torch.manual_seed(seed)
    order = torch.randperm(len(u))
    held, kept = order[:10_000], order[10_000:]
    model = ImplicitModel(
        input_dim=784, output_dim=10, hidden_dim=N, bias=True, constraint=kind, tol=1e-3, grad_tol=1e-2
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    total = EPOCHS * (len(kept) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    losses = []
    with Monitor() as monitor:
        for epoch in range(EPOCHS):
            for rows in kept[torch.randperm(len(kept))].split(BATCH)[: total // EPOCHS]:
                loss = F.cross_entropy(model(u[rows]), y[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                if epoch == EPOCHS - 1:
                    losses.append(loss.detach())
    with torch.no_grad():
        right = torch.cat([model(u[rows]).argmax(dim=1) == y[rows] for rows in held.split(1000)])
    return float(right.double().mean()), float(torch.stack(losses).mean()), monitor.forward_steps


def run() -> None:
    u, y = images()
    print(f"\nConstraint on A, Fashion-MNIST, n = {N}, {EPOCHS} epochs, seeds {SEEDS}: held-out accuracy")
    header("constraint", "lr", "accuracy, mean", "lowest", "highest", "training loss", "forward steps")
    for kind in (RowScaling, RowProjection, SoftRowScaling):
        for lr in (1e-3, 3e-3):
            runs = [accuracy(kind, seed, lr, u, y) for seed in SEEDS]
            accuracies, losses, steps = zip(*runs, strict=True)
            print(
                f"| {kind.__name__} | {lr:g} | {statistics.mean(accuracies):.2%} | {min(accuracies):.2%} "
                f"| {max(accuracies):.2%} | {statistics.mean(losses):.4f} | {statistics.mean(steps):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(2)
    run()
