"""Fashion-MNIST in memory, and the models that the rows compare, trained briefly with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from implicitdl import ImplicitModel
from implicitdl.data import load


def images() -> tuple[Tensor, Tensor]:
    """(60000, 784) pixels in [0, 1] and their labels; IMPLICITDL_DATA names the folder."""
    train = load("fashion-mnist", 256).train_ds
    return train.pixels.flatten(1).float() / 255, train.labels


def trained(n: int, u: Tensor, y: Tensor, *, steps: int, batch: int = 128) -> dict[str, Tensor]:
    """A, B, C, D of an implicit model after some steps of Adam, A inside the ball on which both libraries agree."""
    torch.manual_seed(0)
    model = ImplicitModel(input_dim=784, output_dim=10, hidden_dim=n)
    step = stepper(model, u, y, batch, lr=1e-3)
    for _ in range(steps):
        step()
    (A,) = model.weights()
    weights = {"A": A, "B": model.B, "C": model.C, "D": model.D}
    return {name: weight.detach().clone() for name, weight in weights.items()}  # type: ignore[union-attr]


def stepper(model: nn.Module, u: Tensor, y: Tensor, batch: int, lr: float = 1e-4) -> Callable[[], None]:
    """One training step, on the next batch each time it is called."""
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    at = 0

    def step() -> None:
        nonlocal at
        rows = slice(at, at + batch)
        at = (at + batch) % (len(u) - batch)
        loss = F.cross_entropy(model(u[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


# Of the tutorial's network.
SIZES = (784, 64, 32, 16, 10)


def tutorial_teacher(u: Tensor, y: Tensor, epochs: int = 5) -> nn.Sequential:
    """The tutorial's network and training: Adam 0.01, batches of 128 in order, cross-entropies summed."""
    torch.manual_seed(0)
    first, *rest = (nn.Linear(into, out, bias=False) for into, out in pairwise(SIZES))
    net = nn.Sequential(first, *(part for layer in rest for part in (nn.ReLU(), layer)))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(epochs):
        for rows in torch.arange(len(u)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(u[rows]), y[rows], reduction="sum").backward()
            optimiser.step()
    return net
