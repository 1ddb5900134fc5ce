"""Interval propagation as an implicit model, and the reduction that is exact on a box of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._internal.errors import wrong
from .equivalence import without_linear
from .matrices import assemble, linear, scaled
from .perron import evaluation_error, spread
from .space import StateSpace


def embedding(space: StateSpace) -> StateSpace:
    """The model [ū; u̲] ↦ [ȳ; y̲] that carries boxes through: u̲ ≤ u ≤ ū gives y̲ ≤ y ≤ ȳ, and so for the states.

    With A⁺ = max(A, 0) and A⁻ = min(A, 0),  x̄ = φ(A⁺x̄ + A⁻x̲ + B⁺ū + B⁻u̲ + b_x) and x̲ likewise with the bars
    exchanged: a model with 2n states, well posed by the same λ_pf as the model itself.

    Arguments:
        space: with non-decreasing φ.

    Source: Jafarpour, Abate, Davydov, Bullo & Coogan, Robustness certificates for implicit neural networks (2021).

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, embedding
        >>> embedding(StateSpace.affine(torch.tensor([[-2.0]])))(torch.tensor([[2.0, 1.0]]))  # 1 ≤ u ≤ 2
        tensor([[-2., -4.]])
    """
    for block in space.blocks:
        if block.activation.slope[0] < 0:
            raise wrong("embedding", "non-decreasing φ", f"{block.activation.name}, whose slope can be negative")

    def doubled(M: Tensor) -> Tensor:
        up, down = (M + M.abs()) / 2, (M - M.abs()) / 2
        return assemble([[up, down], [down, up]], [M.shape[0]] * 2, [M.shape[1]] * 2)

    return space.holding(
        **{name: doubled(getattr(space, name)) for name in ("A", "B", "C", "D")},
        b_x=space.b_x.repeat(2),
        b_y=space.b_y.repeat(2),
        blocks=space.blocks * 2,
    )


def pre_activation_bounds(space: StateSpace, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """z̲ ≤ z ≤ z̄ for every input of the box, (n,) each in float64, safe against the tolerance of the solve.

    Arguments:
        space: with non-decreasing φ, and well posed by λ_pf.
        low, high: (p,) the box.
    """
    space = space.detach().to(torch.float64)
    both = embedding(space)
    u = torch.cat((high, low)).double().unsqueeze(0)
    x = both.state(u, on_failure="ignore")
    z = both.pre_activation(x, u)
    noise = evaluation_error(both, x, u)
    error = spread(both, (both.activation.phi(z) - x).abs() + both.slopes * noise)
    upper, lower = z.squeeze(0).split(space.n)
    more, less = (noise + linear(error, both.A.abs())).squeeze(0).split(space.n)
    return lower - less, upper + more


def reduce_on_box(space: StateSpace, low: Tensor, high: Tensor) -> StateSpace:
    """A smaller model with the same outputs for every input of the box.

    States that interval bounds show to be affine on the box are eliminated: under a positively homogeneous φ those
    whose z keeps its sign (of ReLU, the dead and the always active), under any non-decreasing φ those with
    φ(z̲) = φ(z̄), which are constant.  Outside the box the outputs differ.

    Arguments:
        space: with non-decreasing φ, and well posed by λ_pf.
        low, high: (p,) with low ≤ high.

    Raises:
        ArgumentError: a box of another shape or upside down, a φ that may decrease, λ_pf ≥ 1.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, reduce_on_box
        >>> m = StateSpace(torch.zeros(2, 2), torch.tensor([[1.0], [-1.0]]), torch.ones(1, 2))
        >>> reduce_on_box(m, torch.tensor([0.0]), torch.tensor([1.0])).n
        0
    """
    for name, side in (("low", low), ("high", high)):
        if side.shape != (space.p,):
            raise wrong("reduce_on_box", f"{name} of shape (p={space.p},)", tuple(side.shape))
    if not bool((low <= high).all()):
        raise wrong("reduce_on_box", "low ≤ high", f"{int((~(low <= high)).sum())} entries where it is not")
    lower, upper = pre_activation_bounds(space, low, high)
    slope, offset = torch.zeros_like(space.b_x), torch.zeros_like(space.b_x)
    affine = torch.zeros(space.n, dtype=torch.bool, device=space.device)
    at = 0
    for activation, size in space.blocks:
        here = slice(at, at := at + size)
        z_low, z_high = lower[here], upper[here]
        one = torch.ones((), dtype=space.dtype, device=space.device)
        if activation.homogeneous:
            slope[here] = torch.where(z_low >= 0, activation.phi(one), -activation.phi(-one))
            affine[here] = (z_low >= 0) | (z_high <= 0)
        constant = activation.phi(z_low) == activation.phi(z_high)
        offset[here] = torch.where(constant, activation.phi(z_high), 0.0).to(space.dtype)
        slope[here] = torch.where(constant, 0.0, slope[here])
        affine[here] |= constant
    rows = torch.where(affine, slope, 1.0)
    stated = space.holding(A=scaled(space.A, rows), B=scaled(space.B, rows), b_x=rows * space.b_x + offset)
    return without_linear(stated, affine)
