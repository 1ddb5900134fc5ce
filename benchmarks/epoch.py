"""One epoch on Fashion-MNIST from trained weights: ours, torchidl and an MLP of the same parameter count, n = 100."""

from __future__ import annotations

import torch
from fashion import images, stepper, trained
from peer import torchidl_model
from timing import alternate, header
from torch import nn

from implicitdl import ImplicitModel, Monitor

N, BATCH = 100, 64
# What training needs, and what `implicitdl train` uses, beside the library's default.
TOLERANCES = [(1e-5, 1e-5), (1e-3, 1e-2)]


def run() -> None:
    u, y = images()
    weights = trained(N, u, y, steps=2 * len(u) // 128)
    hidden = _same_size(sum(weight.numel() for weight in weights.values()))
    print(f"\nOne epoch of Fashion-MNIST, n = {N}, batch {BATCH}, from weights of two epochs")
    header("tol / grad_tol", "ours s", f"MLP 784-{hidden}-{hidden}-10 s", "torchidl s, at its defaults", "ours ÷ MLP",
           "wanted", "torchidl ÷ MLP", "steps f/b", "missed")  # fmt: skip
    for tol, grad_tol in TOLERANCES:
        ours = ImplicitModel(input_dim=784, output_dim=10, hidden_dim=N, tol=tol, grad_tol=grad_tol)
        ours.load_state_dict(weights)
        theirs, _, _ = torchidl_model(weights, u[:BATCH], torch.zeros(BATCH, 10), 1.0)
        theirs.f.set_parameters(mitr=300, grad_mitr=300, tol=3e-6, grad_tol=3e-6)
        mlp = nn.Sequential(
            nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )
        steps = {name: stepper(m, u, y, BATCH) for name, m in (("ours", ours), ("theirs", theirs), ("mlp", mlp))}
        # Three epochs in pieces of about 50 ms, so that what disturbs the machine for longer hits all sides.
        pieces, count = 20, len(u) // BATCH
        with Monitor() as monitor:
            t = alternate(steps, rounds=3 * pieces, repeats=count // pieces, warm_up=5)
        epoch = {name: seconds * count for name, seconds in t.items()}
        print(
            f"| {tol:.0e} / {grad_tol:.0e} | {epoch['ours']:.2f} | {epoch['mlp']:.2f} | {epoch['theirs']:.2f} "
            f"| {epoch['ours'] / epoch['mlp']:.2f} | ≤ 1.5 | {epoch['theirs'] / epoch['mlp']:.2f} "
            f"| {monitor.forward_steps:.1f}/{monitor.backward_steps:.1f} | {monitor.missed:.2%} |",
            flush=True,
        )


def _same_size(parameters: int) -> int:
    """Hidden width h of 784-h-h-10 with about as many parameters."""
    return min(range(1, 1000), key=lambda h: abs(784 * h + h + h * h + h + 10 * h + 10 - parameters))


if __name__ == "__main__":
    torch.set_num_threads(2)
    run()
