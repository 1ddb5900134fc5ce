"""Faces of the objective: linear systems with a submatrix of one Gram matrix for every row, and Newton's step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

# Entries of the gathered submatrices at a time: 32 MiB where many at once are quick, 1 MiB where a cache holds them.
_ENTRIES, _ENTRIES_CPU = 1 << 22, 1 << 17
# ε/‖G‖: two orders above the rounding of G and of its factors, so that a rank-deficient face has a factor too.
_SHIFT = 1e-13
# ‖H‖ε above which H has too few digits: it is 1 or more when G is singular.
_REGULAR = 0.1


class Faces:
    """(G_SS + εI)⁻¹, for the set S of each row.

    A set of at most half of the unknowns is gathered and factored.  A larger one is solved through its complement Z,
    with H = (G + εI)⁻¹ made once: the solution is that of all unknowns with multipliers μ for w_Z = 0,

        w = H(r − E_Z μ),   H_ZZ μ = (Hr)_Z,

    unless G is so nearly singular that H has lost its digits.

    Arguments:
        gram: G, (d, d), positive semidefinite.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        norm = float(torch.linalg.matrix_norm(gram))
        self.shift = _SHIFT * norm if norm > 0 else 1.0
        self._padded = torch.nn.functional.pad(gram, (0, 1, 0, 1))

    @cached_property
    def inverse(self) -> Tensor:
        """H."""
        shifted = self.gram.clone()
        shifted.diagonal().add_(self.shift)
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted))

    @cached_property
    def regular(self) -> bool:
        """Whether ‖H‖ is well below the 1/ε of a singular G; an unknown without data is apart from all others."""
        rows = torch.linalg.vector_norm(self.inverse, dim=1)[self.gram.diagonal() > 0]
        return float(torch.linalg.vector_norm(rows)) * self.shift < _REGULAR

    @cached_property
    def _padded_inverse(self) -> Tensor:
        return torch.nn.functional.pad(self.inverse, (0, 1, 0, 1))

    def solve(self, support: Tensor, rhs: Tensor, normal: Tensor | None = None) -> Tensor:
        """Solutions on each row's support, zero elsewhere.

        Arguments:
            support: S, (rows, d) bool.
            rhs: (rows, k, d), zero off the support.
            normal: n, (rows, d): the system is G_SS + εI + s nnᵀ, where s is of the size of G.  With nᵀw = 0 asked
                for beside it, this is the same system, and regular where n is all that makes it so.

        Returns:
            (rows, k, d).
        """
        result = torch.zeros_like(rhs)
        large = support.sum(dim=1) > support.shape[1] // 2
        if bool(large.any()) and not self.regular:
            large = torch.zeros_like(large)
        if len(rows := torch.nonzero(~large)[:, 0]) > 0:
            n = None if normal is None else normal[rows]
            result[rows] = _restricted(self._padded, support[rows], rhs[rows], self.shift, n)
        if len(rows := torch.nonzero(large)[:, 0]) > 0:
            free = rhs[rows] @ self.inverse
            held = product(_restricted(self._padded_inverse, ~support[rows], free, 0.0), self.inverse)
            result[rows] = torch.where(support[rows].unsqueeze(1), free - held, 0.0)
        return result


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """(..., d) @ (d, d) without the columns that no row has: faces of neighbours, and their complements, are alike."""
    used = torch.nonzero(rows.flatten(0, -2).any(dim=0))[:, 0]
    if len(used) > len(matrix) // 2:
        return rows @ matrix
    return rows[..., used] @ matrix[used]


def _restricted(padded: Tensor, chosen: Tensor, rhs: Tensor, shift: float, normal: Tensor | None = None) -> Tensor:
    """(M_JJ + shift)⁻¹ rhs_J for the chosen J of each row, from M with a row and a column of zeros appended."""
    result = torch.empty_like(rhs)
    for rows in _alike(chosen.sum(dim=1)):
        n = None if normal is None else normal[rows]
        result[rows] = _padded_together(padded, chosen[rows], rhs[rows], shift, n)
    return result


def _alike(sizes: Tensor) -> list[Tensor]:
    """Rows in groups of about equal size, largest first, so that padding costs little and a group fits in memory."""
    rows = sizes.argsort(descending=True)
    largest = sizes[rows].clamp(min=1).tolist()
    most = _ENTRIES_CPU if rows.device.type == "cpu" else _ENTRIES
    groups, first = [], 0
    while first < len(rows):
        last = first + max(1, most // largest[first] ** 2)
        groups.append(rows[first:last])
        first = last
    return groups


def _padded_together(padded: Tensor, chosen: Tensor, rhs: Tensor, shift: float, normal: Tensor | None) -> Tensor:
    """`_restricted` for rows whose systems are padded to the size of the largest, and factored together."""
    rows, d = chosen.shape
    size = int(chosen.sum(dim=1).max())
    if size == 0:
        return torch.zeros_like(rhs)
    at, column = chosen.nonzero(as_tuple=True)
    index = torch.full((rows, size), d, dtype=torch.int64, device=chosen.device)
    index[at, chosen.cumsum(dim=1)[at, column] - 1] = column
    matrices = padded[index.unsqueeze(2), index.unsqueeze(1)]
    # Padding is an identity block, and its right-hand side the zero appended to rhs.
    diagonal = torch.full_like(index, shift, dtype=padded.dtype).masked_fill(index == d, 1.0)
    matrices.diagonal(dim1=1, dim2=2).add_(diagonal)
    if normal is not None:
        n = torch.nn.functional.pad(normal, (0, 1)).gather(1, index)
        matrices += padded.diagonal()[:-1].mean() * n.unsqueeze(2) * n.unsqueeze(1)
    wide = index.unsqueeze(1).expand(-1, rhs.shape[1], -1)
    known = torch.nn.functional.pad(rhs, (0, 1)).gather(2, wide)
    solved = torch.cholesky_solve(known.transpose(1, 2), torch.linalg.cholesky(matrices)).transpose(1, 2)
    return rhs.new_zeros(*rhs.shape[:2], d + 1).scatter(2, wide, solved)[..., :d]


@dataclass
class Rows:
    """The point of every row and its face.

    Attributes:
        w: (rows, d), the ball's entries first.
        g: (rows, d), minus the gradient of the smooth part at w.
        sign: (rows, d), −1, 0 or 1: the face; an entry of w may be 0 on it.
        tight: (rows,) whether the face holds ‖a‖₁ at κ.
    """

    w: Tensor
    g: Tensor
    sign: Tensor
    tight: Tensor

    @classmethod
    def at(cls, w: Tensor, g: Tensor, n: int, kappa: float) -> Rows:
        # A row within rounding of the sphere is on it.
        return cls(w, g, w.sign(), w[:, :n].abs().sum(dim=1) >= kappa * (1 - 1e-9))

    def take(self, rows: Tensor) -> Rows:
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, rows: Tensor, part: Rows) -> None:
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(part, field.name)


def newton(faces: Faces, rows: Rows, n: int, lam: float) -> tuple[Tensor, Tensor]:
    """d and τ with G_FF d = g_F − λσ_F − τσ_a and σ_aᵀd = 0, from two solutions of one system; τ = 0 off the sphere."""
    support = rows.sign != 0
    descent = torch.where(support, rows.g - lam * rows.sign, 0.0).unsqueeze(1)
    if not bool(rows.tight.any()):
        return faces.solve(support, descent)[:, 0], torch.zeros_like(rows.w[:, 0])
    normal = torch.nn.functional.pad(rows.sign[:, :n] * rows.tight.unsqueeze(1), (0, rows.sign.shape[1] - n))
    free, along = faces.solve(support, torch.cat([descent, normal.unsqueeze(1)], dim=1), normal).unbind(dim=1)
    curvature = (normal * along).sum(dim=1)
    tau = torch.where(curvature > 0, (normal * free).sum(dim=1) / curvature, 0.0)
    return free - tau.unsqueeze(1) * along, tau
