"""The guard of what is exact up to an order, and must not be differentiated once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FirstOrderOnly(torch.autograd.Function):
    """Identity whose own derivative raises.  Everything v depends on is an input, so none gets by."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, *depends_on: Tensor) -> Tensor:
        return v.clone()  # a view made in a Function may not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        raise beyond_order()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise beyond_order()


def beyond_order() -> RuntimeError:
    return RuntimeError(
        "backward: expected derivatives up to the adjoint's order, got a request for the next one. "
        "Pass adjoint=ImplicitAdjoint(order=2) for exact second derivatives, or Unrolled() for any order."
    )
