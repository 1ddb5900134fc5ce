"""The solution of x = φ(Ax + b) block by block: blocks that loop are iterated, every other one is a single pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import IDENTITY, Activation
from ..adjoints import Adjoint
from ..equations.equilibrium import Equilibrium
from ..fixed_point import fixed_point
from ..solution import BackwardReport, OnFailure, Solution, SolveStats, Status
from ..solvers import Solver
from .matrices import assemble, component_numbers, csr, is_sparse, linear, partition

# Share of nonzeros about where a dense product overtakes one with a CSR matrix; it decides on nothing but speed.
_WORTH_SPARSE = 0.1

Needs = tuple[tuple[int, Tensor], ...]  # blocks and the parts of A that multiply their states


class Block(NamedTuple):
    """Consecutive components of the state under one activation."""

    activation: Activation
    size: int


def joined(blocks: Sequence[Block]) -> Activation:
    """φ of the whole state, (batch, n), as one record: each block's own on its components."""
    kinds = list(dict.fromkeys(block.activation for block in blocks))
    if not kinds:
        return IDENTITY
    if len(kinds) == 1:
        return kinds[0]
    return Activation(
        "+".join(kind.name for kind in kinds),
        _Piecewise(tuple(blocks), derivative=False),
        _Piecewise(tuple(blocks), derivative=True),
        (min(kind.slope[0] for kind in kinds), max(kind.slope[1] for kind in kinds)),
        all(kind.homogeneous for kind in kinds),
    )


@dataclass(frozen=True)
class _Piecewise:
    """φ or φ' of every block on its columns.  It keeps the records, which can be pickled where functions cannot."""

    blocks: tuple[Block, ...]
    derivative: bool

    def __call__(self, z: Tensor) -> Tensor:
        parts = z.split([block.size for block in self.blocks], -1)
        kinds = [block.activation for block in self.blocks]
        each = [a.dphi(part) if self.derivative else a.phi(part) for a, part in zip(kinds, parts, strict=True)]
        return torch.cat(each, -1)


@dataclass(frozen=True)
class Component:
    """Blocks that depend on each other, or a single block, and what they need of A.

    Attributes:
        blocks: their numbers, ascending.
        own: A restricted to them; None when they do not feed back, so that one evaluation of φ solves them.
        triangular: whether ``own`` is strictly upper triangular under one φ, so that a substitution solves it.
        needs: for each of them, the blocks outside that it needs and the part of A that multiplies their states.
    """

    blocks: tuple[int, ...]
    own: Tensor | None
    triangular: bool
    activation: Activation
    needs: tuple[Needs, ...]

    def members(self) -> Iterator[tuple[int, Needs]]:
        """Its blocks and what each needs from outside."""
        return zip(self.blocks, self.needs, strict=True)


def plan(A: Tensor, blocks: Sequence[Block]) -> list[Component]:
    """The components of A's block graph, each after all that it needs."""
    if not blocks:
        return []
    sizes = [block.size for block in blocks]
    parts = partition(A, sizes, sizes)
    needs: list[list[int]] = [[] for _ in blocks]
    for k, m in parts:
        needs[k].append(m)
    return [_component(group, needs, parts, blocks) for group in components(parts, len(blocks))]


def components(needs: Collection[tuple[int, int]], size: int) -> list[list[int]]:
    """The strongly connected components of the graph in which k needs m for every pair (k, m).

    Returns:
        The nodes of each, ascending; each component comes after all that it needs.

    Example:
        >>> from implicitdl.statespace.block_solve import components
        >>> components([(0, 1), (1, 2), (2, 1), (3, 0)], 4)
        [[1, 2], [0], [3]]
    """
    rows, columns = torch.tensor([*needs], dtype=torch.int64, device="cpu").view(-1, 2).t()
    number = component_numbers(rows, columns, size).tolist()
    members: dict[int, list[int]] = {c: [] for c in number}
    for node, c in enumerate(number):
        members[c].append(node)
    order = TopologicalSorter({c: set[int]() for c in members})
    for k, m in needs:
        if number[k] != number[m]:
            order.add(number[k], number[m])
    return [members[c] for c in order.static_order()]


def _component(
    group: list[int], needs: list[list[int]], parts: dict[tuple[int, int], Tensor], blocks: Sequence[Block]
) -> Component:
    sizes = [blocks[k].size for k in group]
    own = None
    if any((k, m) in parts for k in group for m in group):
        own = assemble([[parts.get((k, m)) for m in group] for k in group], sizes, sizes)
        if is_sparse(own) and own.values().numel() > _WORTH_SPARSE * own.numel():
            own = own.to_dense()
    inside = set(group)
    outside = tuple(tuple((m, _form(parts[k, m])) for m in needs[k] if m not in inside) for k in group)
    activation = joined([blocks[k] for k in group])
    single = len({blocks[k].activation for k in group}) == 1
    triangular = own is not None and single and not is_sparse(own) and not bool((own.detach().tril() != 0).any())
    return Component(tuple(group), None if own is None else _form(own), triangular, activation, outside)


def _form(M: Tensor) -> Tensor:
    return csr(M) if is_sparse(M) else M


def solve_in_order(
    order: Sequence[Component],
    b: Tensor,
    sizes: Sequence[int],
    x0: Tensor | None,
    solver: Solver | None,
    adjoint: Adjoint | None,
    on_failure: OnFailure,
) -> Solution:
    """x = φ(Ax + b), component by component."""
    inputs = b.split(list(sizes), 1)
    begin = None if x0 is None else x0.split(list(sizes), 1)
    states: dict[int, Tensor] = {}
    solved = []
    for component in order:
        z = torch.cat([_input(inputs[k], needs, states) for k, needs in component.members()], 1)
        if component.own is None:
            value = component.activation.phi(z)
        else:
            # Without a start zero, and the evaluation from there for the price of φ alone.
            start = (
                component.activation.phi(z.detach())
                if begin is None
                else torch.cat([begin[k] for k in component.blocks], 1)
            )
            solution = _iterated(component, component.own, z, start, solver, adjoint, on_failure)
            if len(order) == 1:
                return solution
            solved.append(solution)
            value = solution.value  # type: ignore[assignment]
        for k, part in zip(component.blocks, value.split([sizes[k] for k in component.blocks], 1), strict=True):
            states[k] = part
    x = torch.cat([states[k] for k in range(len(sizes))], 1) if states else b
    return _joined(x, solved)


def _input(z: Tensor, needs: Needs, states: dict[int, Tensor]) -> Tensor:
    for m, weights in needs:
        z = linear(states[m], weights, z)
    return z


def _iterated(
    component: Component,
    A: Tensor,
    z: Tensor,
    start: Tensor,
    solver: Solver | None,
    adjoint: Adjoint | None,
    on_failure: OnFailure,
) -> Solution:
    phi = component.activation.phi
    if is_sparse(A):
        return fixed_point(
            lambda x, z: phi(linear(x, A, z)), start, z, solver=solver, adjoint=adjoint, on_failure=on_failure
        )
    f = Equilibrium(A, z, component.activation, triangular=component.triangular)
    return fixed_point(f, start, solver=solver, adjoint=adjoint, on_failure=on_failure)


def _joined(x: Tensor, solved: Sequence[Solution]) -> Solution:
    """The solution of the whole from those of the components that were iterated.

    With ‖r_k‖ ≤ ρ_k ‖f_k‖ for each component, ‖r‖² = Σ‖r_k‖² ≤ max ρ_k² ‖f‖²: the largest residual bounds that of
    the whole.  Components solved by evaluation have none, unless they overflow.
    """
    finite = torch.isfinite(x.detach()).all(1)
    figures = torch.float64 if x.dtype == torch.float64 else torch.float32
    none = torch.zeros(len(x), dtype=figures, device=x.device).masked_fill(~finite, torch.inf)
    once = torch.ones(len(x), dtype=torch.int64, device=x.device)
    ended = [part.status for part in solved if part.status is not None]
    evaluated = torch.zeros_like(finite, dtype=torch.int8).masked_fill(~finite, int(Status.NOT_FINITE))
    return Solution(
        value=x,
        stats=SolveStats(
            torch.stack([none, *(part.residual for part in solved)]).amax(0),
            torch.stack([once, *(part.steps for part in solved)]).amax(0),
            torch.stack([finite, *(part.converged for part in solved)]).all(0),
            status=torch.stack([evaluated, *ended]).amax(0) if len(ended) == len(solved) else None,
        ),
        backward=solved[0].backward if len(solved) == 1 else BackwardReport(),
    )
