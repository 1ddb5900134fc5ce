"""Handwritten digits with an implicit model: x = φ(Ax + Bu + b_x), y = Cx + Du + b_y.

    python examples/digits.py            # make demo

Trains on the 8 × 8 digits that ship with scikit-learn and tests once, on a stratified 20 % that nothing before has
seen: the number of epochs is fixed beforehand, since the learning rate comes down to 0 over them.  A tenth of the
training data is held out to watch the training by.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import nn

from implicitdl import ImplicitModel, Monitor, viz
from implicitdl.data import Data, load
from implicitdl.training import get_valid_accuracy, train


def main(runs: Path, seed: int = 0, epochs: int = 30) -> float:
    """Train, test and draw; the accuracy on the test set, in %."""
    folder = next(path for i in count(1) if not (path := runs / f"demo-{i}").exists())
    data = load("digits", batch_size=64, holdout=0.1)

    torch.manual_seed(seed)
    model = ImplicitModel(data.input_dim, data.output_dim, hidden_dim=256, bias=True)
    opt = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.02, total_steps=epochs * len(data.train_dl))
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    model, logger = train(
        model, data.train_dl, data.valid_dl, opt, loss_fn, epochs, folder,
        scheduler=rate, scheduler_step="batch", seed=seed,
    )  # fmt: skip

    with Monitor() as monitor:
        _, accuracy = get_valid_accuracy(model, loss_fn, data.test_dl)
    plots = draw(model, data, logger.rows, folder / "plots")

    table = Table("", "parameters", "test accuracy", "steps", "missed tolerance")
    table.add_row(
        "implicit, n = 256", f"{sum(w.numel() for w in model.parameters()):,}", f"{accuracy:.2%}",
        f"{monitor.forward_steps:.1f}", f"{monitor.missed:.2%}",
    )  # fmt: skip
    table.add_row("logistic regression", "650", f"{logistic_regression(data):.2%}", "–", "–")
    Console().print(table)
    print("plots:", plots)
    print(f"test accuracy: {100 * accuracy:.2f} %")
    return 100 * accuracy


def logistic_regression(data: Data) -> float:
    """The test accuracy of scikit-learn's, fitted to training and held-out data together."""
    u, y = (torch.cat(parts) for parts in zip(*data.train_dl, *data.valid_dl, strict=True))
    test_u, test_y = (torch.cat(parts) for parts in zip(*data.test_dl, strict=True))
    fitted = LogisticRegression(max_iter=5000).fit(u.flatten(1).numpy(), y.numpy())
    return float(fitted.score(test_u.flatten(1).numpy(), test_y.numpy()))


def draw(model: ImplicitModel, data: Data, rows: list, folder: Path) -> Path:
    """Training curves, residuals of both solves on test digits, the weights, and the spectrum of A."""
    u, y = next(iter(data.test_dl))
    solution = model.solve(u, trace=True)
    nn.functional.cross_entropy(model.read_out(solution.value, u.flatten(1)), y).backward()
    viz.training_curves(rows, chosen=len(rows), path=folder / "training.png")
    viz.residuals(solution, rtol=1e-5, path=folder / "residuals.png")
    viz.spy(model, magnitude=True, path=folder / "spy.png")
    viz.spectrum(model, path=folder / "spectrum.png")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Handwritten digits with an implicit model.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the folder of this run is made")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.runs, arguments.seed)
