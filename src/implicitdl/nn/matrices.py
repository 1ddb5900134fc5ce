"""An ImplicitModel from and to its matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .._internal.errors import ArgumentError, wrong
from ..constraints import LowRank, RowProjection, RowScaling, SoftRowScaling
from ..statespace import StateSpace, loop_gain

if TYPE_CHECKING:
    from .model import ImplicitModel


def of(model: ImplicitModel) -> StateSpace:
    _refresh(model)
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
    free = _free(model, space)
    state = dict(zip(("L", "R"), free, strict=True)) if low_rank else {"A": free}
    state |= {"B": space.B, "C": space.C, "D": space.D}
    if model.bias:
        state |= {"b_x": space.b_x, "b_y": space.b_y}
    with torch.no_grad():
        for name, value in state.items():
            getattr(model, name).copy_(value)
    return model


def _refresh(model: ImplicitModel) -> None:
    """Weights that torch's pruning and its older normalizations make in a hook before forward, made now."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm)):
            hook(model, ())


def _free(model: ImplicitModel, space: StateSpace) -> Any:
    """The free parameters of the space's A."""
    constraint = model.constraint
    try:
        return constraint.right_inverse(space.A)
    except ArgumentError as error:
        do = "Keep it with constraint=Unconstrained."
        ball = isinstance(constraint, (RowScaling, RowProjection, SoftRowScaling))
        if ball and space.activation.homogeneous and loop_gain(space) < constraint.kappa:
            do = (
                "The same model with an A inside is implicitdl.statespace.rescale(space, kappa="
                f"{constraint.radius:.6g}); or keep this one with constraint=Unconstrained."
            )
        reason = str(error).partition(". ")[0]
        raise wrong("from_statespace", "an A of the constraint's set", f"one outside of it ({reason})", do) from error
