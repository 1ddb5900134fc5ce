"""An ImplicitModel from and to its matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .._checks import wrong
from ..constraints import LowRank
from ..statespace import StateSpace

if TYPE_CHECKING:
    from .model import ImplicitModel


def of(model: ImplicitModel) -> StateSpace:
    weights = model.weights()
    A = weights[0] if len(weights) == 1 else weights[0] @ weights[1].t()
    return StateSpace(A, model.B, model.C, model.D, model.b_x, model.b_y, blocks=model.activation)


def to_model(cls: type[ImplicitModel], space: StateSpace, options: dict[str, Any]) -> ImplicitModel:
    if space.n == 0:
        raise wrong("from_statespace", "a model with states", "n=0", "Take torch.nn.Linear for an affine map.")
    space = space.detach().to_dense()
    constraint = options["constraint"]
    low_rank = isinstance(constraint, LowRank)
    model = cls(
        space.p, space.q, space.n, bias=bool((space.b_x != 0).any() | (space.b_y != 0).any()),
        is_low_rank=low_rank, rank=constraint.rank if low_rank else None,
        activation=space.activation, device=space.device, dtype=space.dtype, **options,
    )  # fmt: skip
    free = model.constraint.right_inverse(space.A)
    state = dict(zip(("L", "R"), free, strict=True)) if low_rank else {"A": free}
    state |= {"B": space.B, "C": space.C, "D": space.D}
    if model.bias:
        state |= {"b_x": space.b_x, "b_y": space.b_y}
    with torch.no_grad():
        for name, value in state.items():
            getattr(model, name).copy_(value)
    return model
