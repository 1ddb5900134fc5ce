"""Recurrences, unrolled over the length of the example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...activations import Activation
from .affine import Affine, NoFormError
from .elementwise import add
from .linear import linear
from .moves import cat, move, stack


def cell(activation: Activation) -> Callable[..., Affine]:
    """h' = φ(W_x u + b_x + W_h h + b_h)."""

    def rule(
        input: Affine,
        hx: Affine | Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Affine:
        old = hx if isinstance(hx, Affine) else input.net.constant(hx)
        return add(linear(input, w_ih, b_ih), linear(old, w_hh, b_hh)).activated(activation)

    return rule


def rnn(activation: Activation) -> Callable[..., Any]:
    """All states of the last layer, and a list of the last states of all layers, whose first dimension is no batch."""
    step = cell(activation)

    def rule(
        input: Affine,
        hx: Tensor,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Affine, list[Affine]]:
        if not batch_first or isinstance(hx, Affine):
            raise NoFormError(
                "its samples do not come first. Build it with batch_first=True, and without a given state"
            )
        if dropout and train:
            raise NoFormError("dropout in training mode is random. Call eval() first")
        sequence = [move("select")(input, 1, t) for t in range(input.shape[1])]
        each, ends = 4 if has_biases else 2, []
        for layer in range(num_layers):
            ways = []
            for way in range(1 + bidirectional):
                k = layer * (1 + bidirectional) + way
                h, states = input.net.constant(hx[k]), []
                for u in reversed(sequence) if way else sequence:
                    h = step(u, h, *params[each * k : each * (k + 1)])
                    states.append(h)
                ends.append(h)
                ways.append(states[::-1] if way else states)
            sequence = [cat(both, 1) for both in zip(*ways, strict=True)]
        return stack(sequence, 1), ends

    return rule
