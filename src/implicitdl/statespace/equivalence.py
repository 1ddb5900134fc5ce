"""Models with other matrices and the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from .._internal.errors import wrong
from .block_solve import Block
from .matrices import (
    coo,
    count_nonzero,
    diagonal_and_rest,
    eye,
    is_sparse,
    loops,
    product,
    scaled,
    sparse,
    take,
    take_rows,
)
from .perron import perron_weights
from .space import StateSpace


def permute(space: StateSpace, order: Tensor | Sequence[int]) -> StateSpace:
    """The model whose state i is the old state ``order[i]``.  States that leave their block take their φ with them.

    Example:
        >>> import torch
        >>> from implicitdl.activations import RELU, TANH
        >>> from implicitdl.statespace import StateSpace, permute
        >>> m = StateSpace(torch.zeros(2, 2), torch.eye(2), torch.eye(2), blocks=[(RELU, 1), (TANH, 1)])
        >>> [block.activation.name for block in permute(m, [1, 0]).blocks]
        ['tanh', 'relu']
    """
    index = torch.as_tensor(order, dtype=torch.int64, device=space.device)
    if not torch.equal(index.sort().values, torch.arange(space.n, device=space.device)):
        raise wrong("permute", f"a permutation of 0 … {space.n - 1}", index.tolist())
    return rewritten(space, index, selection(space, index))


def scale_states(space: StateSpace, v: Tensor) -> StateSpace:
    """The model in the states x/v: A' = S⁻¹AS, B' = S⁻¹B, b_x' = S⁻¹b_x, C' = CS, with S = diag(v).

    Arguments:
        space: the model.
        v: (n,) positive; 1 on states whose φ is not positively homogeneous, φ(tz) = tφ(z).

    Raises:
        ArgumentError: v of another shape, not positive, or not 1 where φ does not allow it.
    """
    if v.shape != (space.n,) or not bool((v > 0).all() & torch.isfinite(v).all()):
        raise wrong(
            "scale_states", f"positive v of shape (n={space.n},)", f"shape {tuple(v.shape)} with {v.tolist()[:4]}"
        )
    for block, part in zip(space.blocks, v.split(list(space.sizes)), strict=True):
        if not block.activation.homogeneous and bool((part != 1).any()):
            raise wrong(
                "scale_states", "v = 1 where φ is not positively homogeneous", f"{block.activation.name}",
                "Only states under ReLU and its like can be measured in other units.",
            )  # fmt: skip
    # The quotients are taken in the wider precision, so that a row that just fits still does after rounding.
    v = v.to(space.device, torch.promote_types(v.dtype, space.dtype))
    A, B = space.A.to(v.dtype), space.B.to(v.dtype)
    return space.holding(
        A=scaled(A, 1 / v, v).to(space.dtype),
        B=scaled(B, 1 / v).to(space.dtype),
        C=scaled(space.C.to(v.dtype), columns=v).to(space.dtype),
        b_x=(space.b_x / v).to(space.dtype),
    )


def rescale(space: StateSpace, kappa: float) -> StateSpace:
    """The same model with ‖A‖∞ ≤ κ, in the units v of `perron_weights`.

    Arguments:
        space: with positively homogeneous φ and λ_pf(|A|) < κ.
        kappa: κ in (0, 1).

    Raises:
        ArgumentError: λ_pf(|A|) ≥ κ, with the number, or a φ that is not positively homogeneous.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, rescale
        >>> m = StateSpace(torch.tensor([[0.0, 7.0], [0.0, 0.0]]), torch.eye(2), torch.eye(2))
        >>> rescale(m, kappa=0.5).A
        tensor([[0.0000, 0.5000],
                [0.0000, 0.0000]])
    """
    return scale_states(space, perron_weights(space.A, kappa))


def eliminate_diagonal(space: StateSpace) -> StateSpace:
    """The same model with a zero diagonal: x_i = φ(a_ii x_i + s) is x_i = φ(s / (1 − h a_ii)), h = max φ'.

    That holds where φ is a multiple of ReLU, h max(z, 0), or of the identity.

    Raises:
        ArgumentError: h a_ii ≥ 1, with the number, or an a_ii ≠ 0 under another φ.

    Source: THEORY §1.4; for s > 0, x = h(a_ii x + s) gives x = hs / (1 − h a_ii) > 0, and for s ≤ 0, x = 0.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, eliminate_diagonal
        >>> m = eliminate_diagonal(StateSpace(torch.tensor([[0.5]]), torch.eye(1), torch.eye(1)))
        >>> m.A, m.B
        (tensor([[0.]]), tensor([[2.]]))
    """
    a, rest = diagonal_and_rest(space.A)
    slopes = []
    for block, part in zip(space.blocks, a.split(list(space.sizes)), strict=True):
        low, high = block.activation.slope
        one_sided = block.activation.homogeneous and (low in (0.0, high))
        if not one_sided and bool((part != 0).any()):
            raise wrong(
                "eliminate_diagonal", "a_ii = 0 where φ is no multiple of ReLU or the identity",
                f"{int((part != 0).sum())} others under {block.activation.name}",
            )  # fmt: skip
        slopes.append(torch.full_like(part, high if one_sided else 0.0))
    gain = torch.cat(slopes) * a if slopes else a
    if bool((gain >= 1).any()):
        raise wrong("eliminate_diagonal", "a_ii max φ' < 1", f"{float(gain.max()):.6g} at i={int(gain.argmax())}")
    rows = 1 / (1 - gain)
    return space.holding(A=scaled(rest, rows), B=scaled(space.B, rows), b_x=rows * space.b_x)


def eliminate_linear(space: StateSpace) -> StateSpace:
    """The same model without the states whose φ is the identity.

    With G = (I − A_ll)⁻¹ they are x_l = G(A_ln x_n + B_l u + b_l), which is substituted wherever x_l is read.

    Raises:
        ArgumentError: I − A_ll is singular, with its singular values.

    Example:
        >>> import torch
        >>> from implicitdl.activations import IDENTITY
        >>> from implicitdl.statespace import StateSpace, eliminate_linear
        >>> m = StateSpace(torch.tensor([[0.5]]), torch.eye(1), torch.eye(1), blocks=IDENTITY)
        >>> eliminate_linear(m).D
        tensor([[2.]])
    """
    linear = [
        block.activation.homogeneous and block.activation.slope == (1.0, 1.0)
        for block in space.blocks
        for _ in range(block.size)
    ]
    return without_linear(space, torch.tensor(linear, dtype=torch.bool, device=space.device))


def without_linear(space: StateSpace, linear: Tensor) -> StateSpace:
    """The same model without the states marked, (n,) bool, for which x = z."""
    kept, gone = (~linear).nonzero().flatten(), linear.nonzero().flatten()
    if len(gone) == 0:
        return space
    G = inverse_of_gap("eliminate_linear", "I − A of the linear states", take(space.A, gone, gone))
    P, Q = product(G, take(space.A, gone, kept)), product(G, take_rows(space.B, gone))
    into = selection(space, gone)
    c = into @ (G @ space.b_x[gone])
    return rewritten(space, kept, selection(space, kept) + product(into, P), product(into, Q), c)


def inverse_of_gap(who: str, what: str, M: Tensor) -> Tensor:
    """(I − M)⁻¹, in the layout of M.

    Where M has no loops it is I + M + M² + …, which ends, and stays sparse when M is.

    Raises:
        ArgumentError: singular up to rounding, with the singular values.
    """
    identity = eye(M.shape[0], M)
    if not loops(M.detach()):
        total, power = identity, M
        while count_nonzero(power):
            total, power = total + power, product(power, M)
        return total.coalesce() if is_sparse(total) else total
    gap = (identity - M).to_dense()
    singular = torch.linalg.svdvals(gap.detach())
    if not float(singular[-1]) > len(gap) * torch.finfo(gap.dtype).eps * float(singular[0]):
        raise wrong(
            who, f"{what} to be invertible",
            f"a smallest singular value of {float(singular[-1]):.3g} beside a largest of {float(singular[0]):.3g}",
        )  # fmt: skip
    inverse = torch.linalg.inv(gap)
    return sparse(inverse) if is_sparse(M) else inverse


def rewritten(
    space: StateSpace, kept: Tensor, P: Tensor, Q: Tensor | None = None, c: Tensor | None = None
) -> StateSpace:
    """The model of the kept states x', given that x = Px' + Qu + c for all states that the output needs.

    A' = A_k P, B' = B_k + A_k Q, b_x' = b_k + A_k c, C' = CP, D' = D + CQ, b_y' = b_y + Cc, where A_k are the rows
    that are kept.

    Arguments:
        space: the model.
        kept: (m,) distinct numbers of the states to keep, in their new order.
        P: (n, m); zero rows for states that the kept states and the output do not need.
        Q: (n, p); None for zeros.
        c: (n,); None for zeros.
    """
    A, B, b_x = take_rows(space.A, kept), take_rows(space.B, kept), space.b_x[kept]
    D, b_y = space.D, space.b_y
    if Q is not None:
        B, D = B + product(A, Q), D + product(space.C, Q)
    if c is not None:
        b_x, b_y = b_x + A @ c, b_y + space.C @ c
    return space.holding(
        A=product(A, P), B=B, C=product(space.C, P), D=D, b_x=b_x, b_y=b_y, blocks=blocks_of(space, kept)
    )


def selection(space: StateSpace, kept: Tensor) -> Tensor:
    """P, (n, m), which puts the j-th kept state in its old place; in the layout of the model."""
    ones = torch.ones(len(kept), dtype=space.dtype, device=space.device)
    P = coo(kept, torch.arange(len(kept), device=kept.device), ones, (space.n, len(kept)))
    return P if space.is_sparse else P.to_dense()


def blocks_of(space: StateSpace, kept: Tensor) -> tuple[Block, ...]:
    """Blocks of the kept states: each run of states from the same old block is one."""
    numbers = block_numbers(space)[kept].tolist()
    return tuple(Block(space.blocks[k].activation, len(list(run))) for k, run in groupby(numbers))


def block_numbers(space: StateSpace) -> Tensor:
    """Number of the block that each state belongs to, (n,)."""
    numbers = [k for k, size in enumerate(space.sizes) for _ in range(size)]
    return torch.tensor(numbers, dtype=torch.int64, device=space.device)
