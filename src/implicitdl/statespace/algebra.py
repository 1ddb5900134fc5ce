"""Models made of models.  States of the part that comes last stand first, so that cascades are upper triangular."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..activations import Activation
from .gap import inverse_of_gap
from .matrices import assemble, eye, product, take
from .perron import loop_gain

if TYPE_CHECKING:
    from .space import StateSpace


def cascade(outer: StateSpace, inner: StateSpace) -> StateSpace:
    """u ↦ outer(inner(u)), also written ``outer @ inner``; well posed when both are.

    A = [[A₂, B₂C₁], [0, A₁]], B = [B₂D₁; B₁], C = [C₂, D₂C₁], D = D₂D₁, where 2 is the outer one.
    """
    outer, inner = _alike("cascade", outer, inner)
    if outer.p != inner.q:
        raise wrong("cascade", f"an outer model whose p is q={inner.q} of the inner one", f"p={outer.p}")
    states = [outer.n, inner.n]
    return outer.holding(
        A=assemble([[outer.A, product(outer.B, inner.C)], [None, inner.A]], states, states),
        B=assemble([[product(outer.B, inner.D)], [inner.B]], states, [inner.p]),
        C=assemble([[outer.C, product(outer.D, inner.C)]], [outer.q], states),
        D=product(outer.D, inner.D),
        b_x=torch.cat((outer.b_x + outer.B @ inner.b_y, inner.b_x)),
        b_y=outer.b_y + outer.D @ inner.b_y,
        blocks=outer.blocks + inner.blocks,
    )


def add(first: StateSpace, second: StateSpace) -> StateSpace:
    """u ↦ first(u) + second(u), also written ``first + second``."""
    first, second = models = _alike("add", first, second)
    _same("add", "p", models)
    _same("add", "q", models)
    return first.holding(
        **_side_by_side(models),
        B=assemble([[first.B], [second.B]], [first.n, second.n], [first.p]),
        C=assemble([[first.C, second.C]], [first.q], [first.n, second.n]),
        D=first.D + second.D,
        b_y=first.b_y + second.b_y,
    )


def scale(model: StateSpace, factor: float) -> StateSpace:
    """u ↦ factor · model(u), also written ``factor * model``."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
        raise wrong("scale", "factor to be a finite number", repr(factor))
    return model.holding(C=factor * model.C, D=factor * model.D, b_y=factor * model.b_y)


def concatenate(*models: StateSpace) -> StateSpace:
    """u ↦ [m₁(u); m₂(u); …], all of the same input.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, concatenate
        >>> twice = StateSpace.affine(torch.tensor([[2.0]]))
        >>> concatenate(twice, -twice)(torch.ones(1, 1))
        tensor([[ 2., -2.]])
    """
    models = _alike("concatenate", *models)
    _same("concatenate", "p", models)
    return models[0].holding(
        **_side_by_side(models),
        B=assemble([[m.B] for m in models], [m.n for m in models], [models[0].p]),
        C=_diagonal([m.C for m in models]),
        D=assemble([[m.D] for m in models], [m.q for m in models], [models[0].p]),
        b_y=torch.cat([m.b_y for m in models]),
    )


def direct_sum(*models: StateSpace) -> StateSpace:
    """[u₁; u₂; …] ↦ [m₁(u₁); m₂(u₂); …], each of an input of its own.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, direct_sum
        >>> twice = StateSpace.affine(torch.tensor([[2.0]]))
        >>> direct_sum(twice, -twice)(torch.tensor([[1.0, 10.0]]))
        tensor([[  2., -20.]])
    """
    models = _alike("direct_sum", *models)
    return models[0].holding(
        **_side_by_side(models),
        B=_diagonal([m.B for m in models]),
        C=_diagonal([m.C for m in models]),
        D=_diagonal([m.D for m in models]),
        b_y=torch.cat([m.b_y for m in models]),
    )


def activate(model: StateSpace, activation: Activation) -> StateSpace:
    """u ↦ ψ(model(u)): the outputs become a block of states, A = [[0, C], [0, A]], B = [D; B].

    Example:
        >>> import torch
        >>> from implicitdl.activations import RELU
        >>> from implicitdl.statespace import StateSpace, activate
        >>> activate(StateSpace.affine(torch.tensor([[1.0], [-1.0]])), RELU)(torch.ones(1, 1))
        tensor([[1., 0.]])
    """
    return cascade(model.elementwise(activation, model.q, model.A), model)


def residual(model: StateSpace, shortcut: Tensor | None = None) -> StateSpace:
    """u ↦ model(u) + Su, where the shortcut S, (q, p), is the identity when left out.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, residual
        >>> residual(StateSpace.affine(torch.tensor([[2.0]])))(torch.ones(1, 1))
        tensor([[3.]])
    """
    if shortcut is None:
        if model.p != model.q:
            raise wrong("residual", f"a shortcut of shape (q={model.q}, p={model.p})", None, "Pass the matrix.")
        shortcut = eye(model.p, model.D)
    return add(model, model.affine(shortcut))


def self_feedback(model: StateSpace, *, check: bool = True) -> StateSpace:
    """The u ↦ y with y = model([u; y]): the last q features of the model's input are its own output.

    With B = [B_u, B_y], D = [D_u, D_y] and E = (I − D_y)⁻¹:  A + B_y E C,  B_u + B_y E D_u,  E C,  E D_u.

    Arguments:
        model: with p > q.
        check: refuse a loop that is not known to be well posed.  The condition, λ_pf of the closed loop's |A| (its rows
            times max|φ'|) below 1, is sufficient; False takes the loop without it.

    Raises:
        ArgumentError: I − D_y is singular, or the condition does not hold, with the number that fails.

    Source: El Ghaoui et al., Implicit Deep Learning (2021), the section on composition; E from solving the output
    equation for y.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, self_feedback
        >>> half = self_feedback(StateSpace.affine(torch.tensor([[1.0, 0.5]])))  # y = u + y/2
        >>> half(torch.ones(1, 1))
        tensor([[2.]])
    """
    who = "self_feedback"
    if model.p <= model.q:
        raise wrong(who, f"p > q={model.q}, the input to end with the output", f"p={model.p}")
    B_u, B_y = _columns(model.B, model.q)
    D_u, D_y = _columns(model.D, model.q)
    E = inverse_of_gap(who, "I − D around the loop", D_y)
    EC, ED, Eb = product(E, model.C), product(E, D_u), E @ model.b_y
    closed = model.holding(
        A=model.A + product(B_y, EC), B=B_u + product(B_y, ED), C=EC, D=ED, b_x=model.b_x + B_y @ Eb, b_y=Eb
    )
    if check and not (gain := loop_gain(closed)) < 1:
        raise wrong(
            who, "a closed loop with λ_pf(|A|) max|φ'| < 1", f"{gain:.6g}",
            "Scale one of the parts down, or pass check=False for a loop that is well posed for another reason.",
        )  # fmt: skip
    return closed


def feedback(forward: StateSpace, backward: StateSpace, *, check: bool = True) -> StateSpace:
    """The u ↦ y with y = forward(u + backward(y)).

    It is the self-feedback of [u; y] ↦ forward(u + backward(y)), so that E = (I − D₁D₂)⁻¹.

    Arguments:
        forward: (p → q).
        backward: (q → p).
        check: as for `self_feedback`.

    Raises:
        ArgumentError: sizes that do not fit, I − D₁D₂ singular, or the loop not known to be well posed.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, feedback
        >>> once, half = StateSpace.affine(torch.tensor([[1.0]])), StateSpace.affine(torch.tensor([[0.5]]))
        >>> feedback(once, half)(torch.ones(1, 1))
        tensor([[2.]])
    """
    forward, backward = _alike("feedback", forward, backward)
    if (backward.p, backward.q) != (forward.q, forward.p):
        raise wrong(
            "feedback", f"a backward model from q={forward.q} to p={forward.p}", f"p={backward.p}, q={backward.q}"
        )
    p, q = forward.p, forward.q
    of_u = forward.affine(assemble([[eye(p, forward.D), None]], [p], [p, q]))
    of_y = forward.affine(assemble([[None, eye(q, forward.D)]], [q], [p, q]))
    return self_feedback(cascade(forward, add(of_u, cascade(backward, of_y))), check=check)


def _columns(M: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """M = [first, last]."""
    rows, columns = torch.arange(M.shape[0], device=M.device), torch.arange(M.shape[1], device=M.device)
    return take(M, rows, columns[:-last]), take(M, rows, columns[-last:])


def _side_by_side(models: tuple[StateSpace, ...]) -> dict[str, Any]:
    """The states of several models that do not see each other."""
    return {
        "A": _diagonal([m.A for m in models]),
        "b_x": torch.cat([m.b_x for m in models]),
        "blocks": sum((m.blocks for m in models), ()),
    }


def _diagonal(parts: list[Tensor]) -> Tensor:
    blocks = [[part if i == j else None for j in range(len(parts))] for i, part in enumerate(parts)]
    return assemble(blocks, [part.shape[0] for part in parts], [part.shape[1] for part in parts])


def _alike(who: str, *models: StateSpace) -> tuple[StateSpace, ...]:
    """The models in one layout, sparse when any is; their dtypes and devices must agree."""
    if not models:
        raise wrong(who, "at least one model", "none")
    for other in models[1:]:
        if (other.dtype, other.device) != (models[0].dtype, models[0].device):
            raise wrong(
                who, f"models of one dtype and device, {models[0].dtype} on {models[0].device}",
                f"{other.dtype} on {other.device}", "Move one of them with .to().",
            )  # fmt: skip
    return tuple(m.to_sparse() for m in models) if any(m.is_sparse for m in models) else models


def _same(who: str, size: str, models: tuple[StateSpace, ...]) -> None:
    sizes = [getattr(m, size) for m in models]
    if len(set(sizes)) > 1:
        raise wrong(who, f"models of the same {size}", sizes)
