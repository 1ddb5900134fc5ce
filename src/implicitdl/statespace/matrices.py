"""Matrices that may be dense or sparse: the few operations the state-space algebra needs, differentiable in both.

Sparse matrices are kept as coalesced COO tensors, which torch can add, concatenate, multiply and differentiate.  Their
entries are sorted by row, so the CSR form, whose product with a dense matrix is the fast one, shares the memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

# Torch warns once per process that CSR is in beta, also inside a COO product; trigger that warning here, unseen.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False, device="cpu")


def is_sparse(M: Tensor) -> bool:
    return M.layout != torch.strided


def coo(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The coalesced matrix with these entries; entries at the same place are added."""
    # check_invariants is explicit, else torch warns that it does not check; the indices are the library's own.
    places = torch.stack((rows, columns))
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False, device=values.device).coalesce()


def with_values(M: Tensor, values: Tensor, width: int | None = None) -> Tensor:
    """A coalesced M with other values at its entries, and with so many columns."""
    shape = (M.shape[0], M.shape[1] if width is None else width)
    return torch.sparse_coo_tensor(
        M.indices(), values, shape, is_coalesced=True, check_invariants=False, device=values.device
    )


def normalized(M: Tensor) -> Tensor:
    """M as it is if strided, in every other layout as coalesced COO."""
    if not is_sparse(M):
        return M
    return (M if M.layout == torch.sparse_coo else M.to_sparse_coo()).coalesce()


def sparse(M: Tensor) -> Tensor:
    if is_sparse(M):
        return M
    rows, columns = M.detach().nonzero(as_tuple=True)
    return coo(rows, columns, M[rows, columns], (M.shape[0], M.shape[1]))


def entries(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the entries that are not zero."""
    if is_sparse(M):
        rows, columns = M.indices()
        kept = M.detach().values() != 0
        return (rows, columns, M.values()) if bool(kept.all()) else (rows[kept], columns[kept], M.values()[kept])
    rows, columns = M.detach().nonzero(as_tuple=True)
    return rows, columns, M[rows, columns]


def count_nonzero(M: Tensor) -> int:
    return int(torch.count_nonzero(M.values() if is_sparse(M) else M))


def abs_row_sums(M: Tensor) -> Tensor:
    """ℓ1 norm of every row, (rows,)."""
    if not is_sparse(M):
        return M.abs().sum(1)
    rows, _, values = entries(M)
    return torch.zeros(M.shape[0], dtype=M.dtype, device=M.device).index_add(0, rows, values.abs())


def csr(M: Tensor) -> Tensor:
    """A sparse M as CSR, on the same memory."""
    rows, columns = M.indices()
    starts = torch.searchsorted(rows, torch.arange(M.shape[0] + 1, device=M.device))
    return torch.sparse_csr_tensor(starts, columns, M.values(), M.shape, check_invariants=False, device=M.device)


def linear(x: Tensor, M: Tensor, b: Tensor | None = None) -> Tensor:
    """xMᵀ + b, (batch, rows of M); M strided, COO or CSR."""
    if not is_sparse(M):
        return x @ M.t() if b is None else torch.addmm(b, x, M.t())
    z = ((csr(M) if M.layout == torch.sparse_coo else M) @ x.t()).t()
    return z if b is None else z + b


def product(M: Tensor, N: Tensor) -> Tensor:
    """M N; sparse when both are."""
    return torch.sparse.mm(M, N).coalesce() if is_sparse(M) and is_sparse(N) else M @ N


def take_rows(M: Tensor, rows: Tensor) -> Tensor:
    """M[rows]."""
    return take(M, rows, torch.arange(M.shape[1], device=M.device)) if is_sparse(M) else M.index_select(0, rows)


def take(M: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """M[rows][:, columns], each a list of distinct indices."""
    if not is_sparse(M):
        return M.index_select(0, rows).index_select(1, columns)
    i, j, values = entries(M)
    new_row, new_column = _places(rows, M.shape[0]), _places(columns, M.shape[1])
    kept = (new_row[i] >= 0) & (new_column[j] >= 0)
    return coo(new_row[i[kept]], new_column[j[kept]], values[kept], (len(rows), len(columns)))


def _places(indices: Tensor, size: int) -> Tensor:
    """Where each of ``size`` old indices stands in the new list; −1 where it does not."""
    places = torch.full((size,), -1, dtype=torch.int64, device=indices.device)
    places[indices] = torch.arange(len(indices), device=indices.device)
    return places


def scaled(M: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """diag(rows) M diag(columns)."""
    if not is_sparse(M):
        M = M if rows is None else rows.unsqueeze(1) * M
        return M if columns is None else M * columns
    i, j, values = entries(M)
    values = values if rows is None else rows[i] * values
    return coo(i, j, values if columns is None else values * columns[j], (M.shape[0], M.shape[1]))


def diagonal_and_rest(M: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal, (n,), and M with zeros in its place."""
    if not is_sparse(M):
        return M.diagonal(), M - torch.diag(M.diagonal())
    rows, columns, values = entries(M)
    on, off = rows == columns, rows != columns
    diagonal = torch.zeros(M.shape[0], dtype=M.dtype, device=M.device).index_put((rows[on],), values[on])
    return diagonal, coo(rows[off], columns[off], values[off], (M.shape[0], M.shape[1]))


def eye(n: int, like: Tensor) -> Tensor:
    """I, in the layout of ``like``."""
    if not is_sparse(like):
        return torch.eye(n, dtype=like.dtype, device=like.device)
    diagonal = torch.arange(n, device=like.device)
    return coo(diagonal, diagonal, torch.ones(n, dtype=like.dtype, device=like.device), (n, n))


def assemble(blocks: Sequence[Sequence[Tensor | None]], heights: Sequence[int], widths: Sequence[int]) -> Tensor:
    """The matrix made of blocks, where None stands for zeros; sparse when any block is."""
    present = [block for row in blocks for block in row if block is not None]
    like = present[0]
    if not any(is_sparse(block) for block in present):
        return torch.cat(
            [
                torch.cat(
                    [like.new_zeros(h, w) if block is None else block for block, w in zip(row, widths, strict=True)], 1
                )
                for row, h in zip(blocks, heights, strict=True)
            ]
        )
    parts = []
    for row, top in zip(blocks, starts(heights), strict=True):
        for block, left in zip(row, starts(widths), strict=True):
            if block is not None:
                i, j, values = entries(block)
                parts.append((i + top, j + left, values))
    i, j, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return coo(i, j, values, (sum(heights), sum(widths)))


def block_diagonal(parts: Sequence[Tensor]) -> Tensor:
    """The matrix with these blocks on its diagonal."""
    blocks = [[part if i == j else None for j in range(len(parts))] for i, part in enumerate(parts)]
    return assemble(blocks, [part.shape[0] for part in parts], [part.shape[1] for part in parts])


def partition(M: Tensor, heights: Sequence[int], widths: Sequence[int]) -> dict[tuple[int, int], Tensor]:
    """The blocks of M that are not zero, by block row and block column; the inverse of `assemble`."""
    tops, lefts = starts(heights), starts(widths)
    if not is_sparse(M):
        # By halves, so that nothing larger than a mask of M is formed.
        filled = M.detach() != 0
        columns = torch.stack([part.any(1) for part in filled.split(list(widths), 1)], 1)
        table = torch.stack([part.any(0) for part in columns.split(list(heights))])
        return {
            (k, m): M[tops[k] : tops[k] + heights[k], lefts[m] : lefts[m] + widths[m]]
            for k, m in table.nonzero().tolist()
        }
    i, j, values = entries(M)
    bounds = torch.searchsorted(i, torch.tensor([*tops, M.shape[0]], dtype=torch.int64, device=M.device)).tolist()
    edges = torch.tensor(lefts, dtype=torch.int64, device=M.device)
    parts = {}
    for k, (first, last) in enumerate(pairwise(bounds)):
        block = torch.searchsorted(edges, j[first:last], right=True) - 1
        for m in block.unique().tolist():
            here = block == m
            parts[k, m] = coo(
                i[first:last][here] - tops[k],
                j[first:last][here] - lefts[m],
                values[first:last][here],
                (heights[k], widths[m]),
            )
    return parts


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each of consecutive pieces of these sizes begins."""
    return list(accumulate(sizes, initial=0))[:-1]


def component_numbers(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """(size,) the strongly connected component of each node, in the graph with the arcs rows[k] → columns[k]."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if size == 0:
        return rows.new_empty(0)
    arcs = (rows.cpu().numpy(), columns.cpu().numpy())
    graph = coo_matrix((np.ones(len(rows), dtype=bool), arcs), shape=(size, size))
    return torch.from_numpy(connected_components(graph, connection="strong")[1]).to(rows)


def loops(A: Tensor) -> list[Tensor]:
    """The strongly connected components that contain a loop, in the graph with an arc i → j for every a_ij ≠ 0.

    Returns:
        The nodes of each, ascending; no component where A can be permuted to be strictly triangular.
    """
    rows, columns, _ = entries(A)
    number = component_numbers(rows, columns, A.shape[0])
    looping = torch.bincount(number)[number] > 1
    looping[rows[rows == columns]] = True
    nodes = looping.nonzero().flatten()
    order = number[nodes].argsort(stable=True)
    sizes = number[nodes].bincount()
    return list(nodes[order].split(sizes[sizes > 0].tolist())) if len(nodes) else []
