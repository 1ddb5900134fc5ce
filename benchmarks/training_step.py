"""One training step (forward, backward, fused Adam) on Fashion-MNIST: torchidl, ours, and an MLP beside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fashion import images, stepper, trained
from floor import floor, products
from peer import torchidl_model
from timing import alternate, header
from torch import nn

from implicitdl import ImplicitModel, Monitor

RTOL = 1e-5
# n, batch, timing rounds, repeats in a round, and what issue and README ask for.
ROWS = [(100, 64, 31, 20, 2.0), (300, 100, 15, 5, 1.7), (1000, 256, 15, 1, 1.3)]


def run(rows: list[tuple[int, int, int, int, float]] = ROWS) -> None:
    u, y = images()
    print(f"\nTraining step on Fashion-MNIST, relative tolerance {RTOL:.0e} forward and backward, same weights")
    header(
        "n", "batch", "ours ms", "torchidl ms", "MLP ms", "torchidl ÷ ours", "wanted", "ours ÷ MLP", "floor ms",
        "ours ÷ floor", "our steps f/b", "our residual f/b", "torchidl's f/b",
    )  # fmt: skip
    for n, batch, rounds, repeats, wanted in rows:
        weights = trained(n, u, y, steps=200)
        ours = ImplicitModel(input_dim=784, output_dim=10, hidden_dim=n, tol=RTOL, grad_tol=RTOL)
        ours.load_state_dict(weights)
        forward, backward, steps = reached(ours, u[:batch], y[:batch])
        g = _cotangent(ours, u[:batch], y[:batch])
        theirs, theirs_reached, theirs_grad = torchidl_model(weights, u[:batch], g, RTOL)
        mlp = nn.Sequential(nn.Linear(784, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 10))
        sides = {name: stepper(m, u, y, batch) for name, m in (("ours", ours), ("theirs", theirs), ("mlp", mlp))}
        t = alternate({**sides, **products(ours, u[:batch])}, rounds=rounds, repeats=repeats)
        least = floor(t, steps)
        print(
            f"| {n} | {batch} | {t['ours'] * 1e3:.2f} | {t['theirs'] * 1e3:.2f} | {t['mlp'] * 1e3:.2f} "
            f"| {t['theirs'] / t['ours']:.2f} | ≥ {wanted} | {t['ours'] / t['mlp']:.2f} "
            f"| {least * 1e3:.2f} | {t['ours'] / least:.2f} "
            f"| {steps[0]:.1f}/{steps[1]:.1f} "
            f"| {forward:.0e}/{backward:.0e} | {theirs_reached:.0e}/{theirs_grad:.0e} |",
            flush=True,
        )


def reached(model: ImplicitModel, u: torch.Tensor, y: torch.Tensor) -> tuple[float, float, tuple[float, float]]:
    with Monitor() as monitor:
        solution = model.solve(u)
        F.cross_entropy(model.read_out(solution.value, u), y).backward()
    assert solution.backward.residual is not None
    steps = (monitor.forward_steps, monitor.backward_steps)
    return float(solution.residual.max()), float(solution.backward.residual.max()), steps


def _cotangent(model: ImplicitModel, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    prediction = model(u).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(prediction, y), prediction)
    return g


if __name__ == "__main__":
    torch.set_num_threads(2)
    run()
