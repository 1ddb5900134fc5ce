"""The graph of a matrix, with an arc from i to j for every a_ij that is not zero: its loops and its components."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .matrices import entries


def components(needs: Sequence[Sequence[int]]) -> list[list[int]]:
    """The strongly connected components of the graph with an arc from k to every node of ``needs[k]``.

    They come in an order in which each one needs only itself and earlier ones; inside, nodes ascend.

    Source: Tarjan, Depth-first search and linear graph algorithms, SIAM J. Comput. 1 (1972), with a path of its own
    in place of recursion, since a chain of layers may be longer than Python's stack.

    Example:
        >>> from implicitdl.statespace.graph import components
        >>> components([[1], [2], [1], [0]])
        [[1, 2], [0], [3]]
    """
    found: list[list[int]] = []
    number: dict[int, int] = {}  # nodes in the order of their discovery
    lowest: dict[int, int] = {}  # the earliest open node that each can reach
    place: dict[int, int] = {}  # where each open node stands among the open ones
    waiting: list[int] = []
    path: list[tuple[int, Iterator[int]]] = []

    def enter(node: int) -> None:
        number[node] = lowest[node] = len(number)
        place[node] = len(waiting)
        waiting.append(node)
        path.append((node, iter(needs[node])))

    for root in range(len(needs)):
        if root not in number:
            enter(root)
        while path:
            node, rest = path[-1]
            for other in rest:
                if other not in number:
                    enter(other)
                    break
                if other in place:
                    lowest[node] = min(lowest[node], number[other])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[node])
                if lowest[node] == number[node]:
                    component = waiting[place[node] :]
                    del waiting[place[node] :]
                    for member in component:
                        del place[member]
                    found.append(sorted(component))
    return found


def looping(A: Tensor) -> tuple[list[list[int]], Tensor]:
    """The graph of A without the nodes from which no loop can be reached, and which nodes have stayed.

    Nodes without arcs are taken away together, which costs as many passes as the longest path has nodes.

    Returns:
        The successors of each node that stays, in new numbers, and their old numbers, (count,).
    """
    rows, columns, _ = entries(A)
    while True:
        degree = torch.bincount(rows, minlength=A.shape[0])
        kept = degree[columns] > 0
        if bool(kept.all()):
            break
        rows, columns = rows[kept], columns[kept]
    nodes = degree.nonzero().flatten()
    if len(nodes) == 0:
        return [], nodes
    new = torch.searchsorted(nodes, columns)
    return [part.tolist() for part in new.split(degree[nodes].tolist())], nodes


def reached(start: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Which nodes are on a path from those marked in ``start``, (n,) bool, along the arcs from sources to targets."""
    marked = start.clone()
    count = -1
    while count != (count := int(marked.sum())):
        marked[targets[marked[sources]]] = True
    return marked
