"""A training step by torch's matrix products and optimiser alone: the floor under every step that is made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from implicitdl import ImplicitModel


def products(model: ImplicitModel, u: Tensor) -> dict[str, Callable[[], object]]:
    """uBᵀ, xAᵀ, VᵀU, VᵀX and fused Adam, each into memory that is there; D aside."""
    batch, n, p = len(u), model.hidden_dim, model.input_dim
    A, B = model.A.detach(), model.B.detach()
    x, v, by_n, by_p = torch.randn(batch, n), torch.randn(batch, n), torch.empty(n, n), torch.empty(n, p)
    parameters = [nn.Parameter(weight.detach().clone()) for weight in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    into = torch.empty(batch, n)
    return {
        "uB": lambda: torch.mm(u, B.t(), out=into),
        "xA": lambda: torch.mm(x, A.t(), out=into),
        "VU": lambda: torch.mm(v.t(), u, out=by_p),
        "VX": lambda: torch.mm(v.t(), x, out=by_n),
        "Adam": torch.optim.Adam(parameters, fused=True).step,
    }


def floor(seconds: dict[str, float], steps: tuple[float, float]) -> float:
    """Seconds of a step that takes so many xAᵀ forward and backward.  The compiled sweep may be faster than torch's."""
    return sum(steps) * seconds["xA"] + sum(seconds[name] for name in ("uB", "VU", "VX", "Adam"))
