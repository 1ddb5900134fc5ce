"""Models made of models.  States of the part that comes last stand first, so that cascades are upper triangular."""

from __future__ import annotations

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..activations import Activation
from .equivalence import inverse_of_gap
from .matrices import assemble, block_diagonal, eye, product, take
from .perron import loop_gain
from .space import StateSpace, alike, same_size, side_by_side


def cascade(outer: StateSpace, inner: StateSpace) -> StateSpace:
    """u ↦ outer(inner(u)), also written ``outer @ inner``; well posed when both are.

    A = [[A₂, B₂C₁], [0, A₁]], B = [B₂D₁; B₁], C = [C₂, D₂C₁], D = D₂D₁, where 2 is the outer one.
    """
    return outer @ inner


def add(first: StateSpace, second: StateSpace) -> StateSpace:
    """u ↦ first(u) + second(u), also written ``first + second``."""
    return first + second


def scale(model: StateSpace, factor: float) -> StateSpace:
    """u ↦ factor · model(u), also written ``factor * model``."""
    return model * factor


def concatenate(*models: StateSpace) -> StateSpace:
    """u ↦ [m₁(u); m₂(u); …], all of the same input.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, concatenate
        >>> twice = StateSpace.affine(torch.tensor([[2.0]]))
        >>> concatenate(twice, -twice)(torch.ones(1, 1))
        tensor([[ 2., -2.]])
    """
    models = alike("concatenate", *models)
    same_size("concatenate", "p", models)
    return models[0].holding(
        **side_by_side(models),
        B=assemble([[m.B] for m in models], [m.n for m in models], [models[0].p]),
        C=block_diagonal([m.C for m in models]),
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
    models = alike("direct_sum", *models)
    return models[0].holding(
        **side_by_side(models),
        B=block_diagonal([m.B for m in models]),
        C=block_diagonal([m.C for m in models]),
        D=block_diagonal([m.D for m in models]),
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
    forward, backward = alike("feedback", forward, backward)
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
