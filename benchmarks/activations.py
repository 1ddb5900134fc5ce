"""A training step on Fashion-MNIST for each activation of the compiled loop, beside the same step with ReLU.

All sides have the same weights, those of a trained ReLU model, so that their sweeps differ; the last column divides by
them.
"""

from __future__ import annotations

import torch
from fashion import images, stepper, trained
from timing import alternate, header, machine
from training_step import RTOL, reached

from implicitdl import ImplicitModel
from implicitdl.activations import COMPILED


def run(n: int = 100, batch: int = 64, rounds: int = 31, repeats: int = 20) -> None:
    u, y = images()
    print(
        f"\nTraining step on Fashion-MNIST, n = {n}, batch {batch}, relative tolerance {RTOL:.0e} forward and backward"
    )
    header("activation", "ms", "÷ ReLU", "sweeps f/b", "residual f/b", "÷ ReLU, per sweep")
    weights = trained(n, u, y, steps=200)
    sides, figures = {}, {}
    for phi in COMPILED:
        model = ImplicitModel(784, 10, n, activation=phi, tol=RTOL, grad_tol=RTOL)
        model.load_state_dict(weights)
        figures[phi.name] = reached(model, u[:batch], y[:batch])
        sides[phi.name] = stepper(model, u, y, batch)
    t = alternate(sides, rounds=rounds, repeats=repeats)
    sweeps = {name: sum(steps) for name, (*_, steps) in figures.items()}
    for name, (forward, backward, steps) in figures.items():
        ratio = t[name] / t["relu"]
        print(
            f"| {name} | {t[name] * 1e3:.2f} | {ratio:.2f} | {steps[0]:.1f}/{steps[1]:.1f} "
            f"| {forward:.0e}/{backward:.0e} | {ratio * sweeps['relu'] / sweeps[name]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(machine())
    run()
