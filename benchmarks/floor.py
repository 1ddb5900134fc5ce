"""What no implementation of a training step goes below: its matrix products and its optimiser, by themselves."""

from __future__ import annotations

import torch
from timing import alternate
from torch import Tensor, nn

from implicitdl import ImplicitModel


def floor(model: ImplicitModel, u: Tensor, steps: tuple[float, float], *, rounds: int, repeats: int) -> float:
    """Seconds of uBᵀ, as many xAᵀ as steps were made forward and backward, VᵀU, VᵀX and fused Adam; D aside.

    Each is torch's, into memory that is there.
    """
    batch, n, p = len(u), model.hidden_dim, model.input_dim
    A, B = model.A.detach(), model.B.detach()
    x, v, by_n, by_p = torch.randn(batch, n), torch.randn(batch, n), torch.empty(n, n), torch.empty(n, p)
    parameters = [nn.Parameter(weight.detach().clone()) for weight in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    into = torch.empty(batch, n)
    t = alternate(
        {
            "uB": lambda: torch.mm(u, B.t(), out=into),
            "sweep": lambda: torch.mm(x, A.t(), out=into),
            "VU": lambda: torch.mm(v.t(), u, out=by_p),
            "VX": lambda: torch.mm(v.t(), x, out=by_n),
            "Adam": torch.optim.Adam(parameters, fused=True).step,
        },
        rounds=rounds,
        repeats=repeats,
    )
    return sum(steps) * t["sweep"] + t["uB"] + t["VU"] + t["VX"] + t["Adam"]
