"""Smaller models with the same outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers import Auto
from .equivalence import block_numbers, blocks_of, rewritten, selection
from .matrices import abs_row_sums, assemble, coo, entries, scaled, take, take_rows
from .space import StateSpace

# States that never change are found once and used for ever: to nearly the last digits of float64.
_CONSTANTS = Auto(rtol=1e-13, max_steps=10_000)
# Two rows of ℓ1 norm 1 are the same when they differ by less than the rounding of their two quotients.
_SAME_ROW = 8
# Where the key of a row is its product with random weights; the seed only decides which rows may hide each other.
_SEED = 0


def reduce(space: StateSpace) -> StateSpace:
    """The same model without the states that it does not need.

    `fold_constant`, `drop_unobservable` and `merge_proportional`, until none of them finds more.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, reduce
        >>> m = StateSpace(torch.zeros(3, 3), torch.tensor([[1.0], [2.0], [0.0]]), torch.ones(1, 3))
        >>> reduce(m)
        StateSpace(n=1, p=1, q=1, blocks=relu 1, dense torch.float32)
    """
    size = space.n + 1
    while space.n < size:
        size = space.n
        space = merge_proportional(drop_unobservable(fold_constant(space)))
    return space


def drop_unobservable(space: StateSpace) -> StateSpace:
    """The same model without the states from which no path of nonzero weights leads to an output.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, drop_unobservable
        >>> drop_unobservable(StateSpace(torch.zeros(2, 2), torch.ones(2, 1), torch.tensor([[0.0, 1.0]]))).n
        1
    """
    rows, columns, _ = entries(space.A)
    seen = torch.zeros(space.n, dtype=torch.bool, device=space.device)
    seen[entries(space.C)[1]] = True
    return _kept(space, _reached(seen, rows, columns))


def fold_constant(space: StateSpace) -> StateSpace:
    """The same model without the states that no input reaches: they are constant and go into the biases.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, fold_constant
        >>> m = StateSpace(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), b_x=torch.tensor([2.0]))
        >>> fold_constant(m).b_y
        tensor([2.])
    """
    rows, columns, _ = entries(space.A)
    moved = torch.zeros(space.n, dtype=torch.bool, device=space.device)
    moved[entries(space.B)[0]] = True
    moved = _reached(moved, columns, rows)
    still = (~moved).nonzero().flatten()
    if len(still) == 0:
        return space
    alone = StateSpace(
        take(space.A, still, still), space.A.new_zeros(len(still), 1), space.A.new_zeros(1, len(still)),
        b_x=space.b_x[still], blocks=blocks_of(space, still),
    ).to(torch.float64)  # fmt: skip
    nothing = torch.zeros(1, 1, dtype=torch.float64, device=space.device)
    x = alone.state(nothing, solver=_CONSTANTS, on_failure="raise")
    return _kept(space, moved, torch.zeros_like(space.b_x).index_put((still,), x.squeeze(0).to(space.dtype)))


def merge_proportional(space: StateSpace) -> StateSpace:
    """The same model with one state for all whose rows (A_i, B_i, b_i) are positive multiples of each other.

    If z_i = t z_j then x_i = t x_j under a positively homogeneous φ; under any other, only equal rows are merged.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import StateSpace, merge_proportional
        >>> m = merge_proportional(StateSpace(torch.zeros(2, 2), torch.tensor([[1.0], [3.0]]), torch.ones(1, 2)))
        >>> m.C
        tensor([[4.]])
    """
    column = space.b_x.unsqueeze(1)
    R = assemble([[space.A, space.B, column]], [space.n], [space.n, space.p, 1])
    sizes = abs_row_sums(R.detach())
    sizes = torch.where(sizes > 0, sizes, 1.0)
    leader = torch.arange(space.n, device=space.device)
    numbers = block_numbers(space)
    for activation in dict.fromkeys(block.activation for block in space.blocks):
        same = [block.activation == activation for block in space.blocks]
        own = torch.tensor(same, dtype=torch.bool, device=space.device)
        states = own[numbers].nonzero().flatten()
        unit = sizes[states] if activation.homogeneous else torch.ones_like(sizes[states])
        leader[states] = states[_first_of_equal(scaled(take_rows(R.detach(), states), 1 / unit))]
        sizes[states] = unit
    kept = (leader == torch.arange(space.n, device=space.device)).nonzero().flatten()
    if len(kept) == space.n:
        return space
    P = coo(torch.arange(space.n, device=space.device), torch.searchsorted(kept, leader), sizes / sizes[leader],
            (space.n, len(kept)))  # fmt: skip
    return rewritten(space, kept, P if space.is_sparse else P.to_dense())


def _first_of_equal(R: Tensor) -> Tensor:
    """(rows,) for each row the number of the first that equals it, up to rounding.

    Equal rows have equal keys, and stand beside each other when sorted by them.  Rows that differ but have the same
    key to the last digit could keep two equal ones apart, and one state more would stay.
    """
    weights = torch.rand(R.shape[1], generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64, device="cpu")
    order = torch.argsort(R @ weights.to(R), stable=True)
    apart = abs_row_sums(take_rows(R, order[1:]) - take_rows(R, order[:-1]))
    size = abs_row_sums(take_rows(R, order[1:]))
    new = torch.ones(len(order), dtype=torch.bool, device=R.device)
    new[1:] = apart > _SAME_ROW * torch.finfo(R.dtype).eps * size
    group = torch.empty_like(order)
    group[order] = new.cumsum(0) - 1
    first = torch.full((int(new.sum()),), len(order), dtype=torch.int64, device=R.device)
    numbers = torch.arange(len(order), device=R.device)
    return first.scatter_reduce(0, group, numbers, "amin")[group]


def _kept(space: StateSpace, mask: Tensor, constants: Tensor | None = None) -> StateSpace:
    if bool(mask.all()):
        return space
    kept = mask.nonzero().flatten()
    return rewritten(space, kept, selection(space, kept), c=constants)


def _reached(start: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Which nodes are on a path from those marked in ``start``, (n,) bool, along the arcs from sources to targets."""
    marked = start.clone()
    count = -1
    while count != (count := int(marked.sum())):
        marked[targets[marked[sources]]] = True
    return marked
