"""Monotone models on Fashion-MNIST: accuracy, samples that missed the tolerance, and I − A ⪰ mI after every step.

IMPLICITDL_DATA names the folder with the data.
"""

from __future__ import annotations

import argparse
import time
from statistics import mean

import torch
import torch.nn.functional as F
from timing import header, machine

from implicitdl import ImplicitAdjoint, ImplicitModel, Monitor, PeacemanRachford
from implicitdl.constraints import Monotone
from implicitdl.constraints.monotone import monotonicity
from implicitdl.data import Data, load
from implicitdl.equations.circular import transfer
from implicitdl.nn import MonotoneConvClassifier

M, BATCH, SEED = 0.5, 128, 0
SOLVER = PeacemanRachford(rtol=1e-2, sweeps=3)
ADJOINT = ImplicitAdjoint(solver=SOLVER)
Model = ImplicitModel | MonotoneConvClassifier


def dense() -> ImplicitModel:
    return ImplicitModel(784, 10, 100, bias=True, constraint=Monotone(m=M), solver=SOLVER, adjoint=ADJOINT)


def convolutional() -> MonotoneConvClassifier:
    return MonotoneConvClassifier(1, 10, channels=48, m=M, halvings=2, solver=SOLVER, adjoint=ADJOINT)


def margin(model: Model) -> float:
    """How far the smallest eigenvalue of the symmetric part of I − A lies above m, in float64."""
    with torch.no_grad():
        if isinstance(model, ImplicitModel):
            return monotonicity(model.weights()[0]) - M
        block = model.deq.f
        # Two halvings of 28 × 28: on 7 × 7 these are all frequencies.
        return monotonicity(transfer(block.constraint(block.raw).double(), (7, 7))) - M


def row(name: str, model: Model, data: Data, epochs: int, lr: float, limit: int | None) -> None:
    """Train by AdamW in one cycle of the learning rate, test, and print."""
    images, labels = data.train_ds.pixels[:limit].float() / 255, data.train_ds.labels[:limit]
    batches = len(images) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * batches)
    lowest, start = float("inf"), time.perf_counter()
    steps = []
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH)[:batches]:
            with Monitor() as monitor:
                loss = F.cross_entropy(model(images[rows]), labels[rows])
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            schedule.step()
            lowest = min(lowest, margin(model))
            steps.append((monitor.missed, monitor.forward_steps, monitor.backward_steps))
    missed, forward, backward = map(mean, zip(*steps, strict=True))
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad(), Monitor() as tested:
        y = torch.cat([model(part.float() / 255) for part in data.test_ds.pixels.split(500)])
    accuracy = float((y.argmax(dim=1) == data.test_ds.labels).double().mean())
    print(
        f"| {name} | {epochs} | {accuracy:.2%} | {missed:.3%} | {tested.missed:.3%} | {lowest:.1e} "
        f"| {forward:.1f} | {backward:.1f} | {seconds:.0f} s |",
        flush=True,
    )


def run(epochs: int, limit: int | None) -> None:
    data = load("fashion-mnist", BATCH)
    print(f"\nFashion-MNIST, m = {M}, rtol = {SOLVER.rtol:g}, batches of {BATCH}, seed {SEED}")
    header(
        "model", "epochs", "test accuracy", "missed in training", "missed in testing", "smallest eigenvalue − m",
        "products forward", "backward", "training",
    )  # fmt: skip
    for name, model, times, lr in (("dense, n = 100", dense, 2, 3e-3), ("convolutional", convolutional, 1, 5e-3)):
        torch.manual_seed(SEED)
        row(name, model(), data, times * epochs, lr, limit)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3, help="of the convolutional model; the dense one gets twice")
    parser.add_argument("--limit", type=int, help="train on the first images only")
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(machine())
    run(options.epochs, options.limit)
