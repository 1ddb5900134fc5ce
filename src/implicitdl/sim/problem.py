"""The rows of state matching: what is minimised, over which data, and the linear systems of its active sets."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._internal.errors import finite, non_negative, wrong

# Samples of the states that are in memory in float64 at a time: 160 MiB for 5,000 features.
_CHUNK = 4096
# Strips of rows in which the Gram matrix is made up to its diagonal: nearly half of the work is left out.
_STRIPS = 8
# Entries of the gathered submatrices at a time: 32 MiB where many at once are quick, 1 MiB where a cache holds them.
_ENTRIES, _ENTRIES_CPU = 1 << 22, 1 << 17
# ε/‖G‖: two orders above the rounding of G and of its factors, so that a rank-deficient face has a factor too.
_SHIFT = 1e-13
# ‖H‖ε above which H has too few digits: it is 1 or more when G is singular.
_REGULAR = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class RowProblem:
    """One independent convex problem per row t of T.

    min ½‖t − Xᵀa − Uᵀb‖² + λ(‖a‖₁ + ‖b‖₁) + ½μ(‖a‖² + ‖b‖²)   subject to  ‖a‖₁ ≤ κ

    The rows (a, b) of A and B have T = Z and κ < 1; those of C and D have T = Y and κ = ∞.

    Arguments:
        X: states (n, samples).
        U: inputs (p, samples).
        T: targets (rows, samples).
        lam: λ ≥ 0.
        kappa: κ > 0, the radius of the ball that holds a; ∞ for none.
        ridge: μ ≥ 0, which makes the penalty an elastic net.

    The data stay in their own dtype; sums over samples are made in float64, a few thousand samples at a time.

    Raises:
        ArgumentError: shapes that do not fit, a NaN or infinite entry, λ, κ or μ out of range.

    Example:
        >>> import torch
        >>> from implicitdl.sim.problem import RowProblem
        >>> problem = RowProblem(X=torch.eye(2, 3), U=torch.ones(1, 3), T=torch.ones(4, 3), lam=0.1, kappa=0.9)
        >>> problem.shape
        (4, 3)
    """

    X: Tensor
    U: Tensor
    T: Tensor
    lam: float
    kappa: float = math.inf
    ridge: float = 0.0

    def __post_init__(self) -> None:
        who = "RowProblem"
        m = self.T.shape[-1]
        for name in ("X", "U", "T"):
            states = getattr(self, name)
            if states.dim() != 2 or states.shape[1] != m or not states.is_floating_point() or m == 0:
                got = f"{tuple(states.shape)} of {states.dtype}"
                raise wrong(who, f"floating {name} of shape (features, samples={m})", got, "Columns are samples here.")
            finite(who, name, states)
        non_negative(who, "lam", self.lam)
        non_negative(who, "ridge", self.ridge)
        if not self.kappa > 0:
            raise wrong(who, "kappa > 0", self.kappa)

    @property
    def n(self) -> int:
        """States, the entries of a."""
        return self.X.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, n + p): of the unknowns w = (a, b)."""
        return self.T.shape[0], self.X.shape[0] + self.U.shape[0]

    def __getitem__(self, rows: Tensor) -> RowProblem:
        """The same problem for some of the rows; what is known of the data is kept."""
        part = copy.copy(self)
        for name in ("T", "correlation", "target_square"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][rows]
        return part

    def replace(self, **changes: Any) -> RowProblem:
        """The problem of another T, lam, kappa or ridge on the same data."""
        part = dataclasses.replace(self, **changes)
        if part.ridge == self.ridge:
            of_data = ("_phi", "gram", "systems")
            part.__dict__.update({name: self.__dict__[name] for name in of_data if name in self.__dict__})
        return part

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(Φ, T) = ([X; U], T) of some samples at a time, in float64."""
        if self.T.shape[1] <= _CHUNK:
            yield self._phi, self.T.double()
            return
        for X, U, T in zip(*(states.split(_CHUNK, dim=1) for states in (self.X, self.U, self.T)), strict=True):
            yield torch.cat([X, U]).double(), T.double()

    @cached_property
    def _phi(self) -> Tensor:
        """Φ where it is a single chunk, converted once."""
        return torch.cat([self.X, self.U]).double()

    @cached_property
    def gram(self) -> Tensor:
        """G = ΦΦᵀ + μI, (d, d)."""
        return self._mirrored(self._lower(0, 1))

    def gram_of_all(self, process: int, processes: int, add: Callable[[Tensor], object]) -> None:
        """`gram`, of which each process makes a share, the same digits whoever makes which.

        Arguments:
            process, processes: which of how many this is.
            add: adds up a tensor over all processes, in place.
        """
        if "gram" not in self.__dict__:
            add(lower := self._lower(process, processes))
            self.__dict__["gram"] = self._mirrored(lower)

    def _lower(self, process: int, processes: int) -> Tensor:
        """ΦΦᵀ up to the diagonal, in the strips of one process of so many, and 0 elsewhere."""
        d = self.shape[1]
        lower = torch.zeros(d, d, dtype=torch.float64, device=self.T.device)
        for phi, _ in self.chunks():
            for first, last in self._strips[process::processes]:
                lower[first:last, :last].addmm_(phi[first:last], phi[:last].t())
        return lower

    def _mirrored(self, gram: Tensor) -> Tensor:
        """G from `_lower`, in place."""
        for first, last in self._strips:
            gram[:first, first:last] = gram[first:last, :first].t()
        gram.diagonal().add_(self.ridge)
        return gram

    @property
    def _strips(self) -> list[tuple[int, int]]:
        """The first row and the one after the last."""
        d = self.shape[1]
        size = -(-d // _STRIPS)
        return [(first, min(first + size, d)) for first in range(0, d, size)]

    @cached_property
    def systems(self) -> ActiveSetSystems:
        """Linear systems with submatrices of G."""
        return ActiveSetSystems(self.gram)

    @cached_property
    def correlation(self) -> Tensor:
        """q = TΦᵀ, (rows, d): minus the gradient of the smooth part at w = 0."""
        return self.image(self.T)

    def image(self, theta: Tensor) -> Tensor:
        """Φθ, (rows, d), for θ (rows, samples)."""
        total = torch.zeros(len(theta), self.shape[1], dtype=torch.float64, device=theta.device)
        for (phi, _), part in zip(self.chunks(), theta.split(_CHUNK, dim=1), strict=True):
            total.addmm_(part.double(), phi.t())
        return total

    @cached_property
    def target_square(self) -> Tensor:
        """(rows,) ‖t‖²."""
        return self.T.double().square().sum(dim=1)

    def lambda_max(self) -> Tensor:
        """(rows,) the smallest λ for which w = 0 is optimal."""
        return self.correlation.abs().amax(dim=1)

    def residual(self, w: Tensor, correction: Tensor | None = None) -> ResidualStats:
        """θ = t − Φᵀw − Φᵀc from the data themselves, and what the objective and the dual need of it.

        With a ridge, of Φ and t with √μ I and 0 appended.

        The correction c is subtracted from the residual, not added to w: where the residual is far smaller than t,
        the difference t − Φᵀ(w + c) would lose to rounding what c is there to bring.
        """
        gradient = torch.zeros(self.shape, dtype=torch.float64, device=self.T.device)
        square, product = gradient.new_zeros(len(w)), gradient.new_zeros(len(w))
        for phi, T in self.chunks():
            theta = torch.addmm(T, w, phi, alpha=-1)
            if correction is not None:
                theta.addmm_(correction, phi, alpha=-1)
            gradient.addmm_(theta, phi.t())
            square += (theta * theta).sum(dim=1)
            product += (theta * T).sum(dim=1)
        if self.ridge > 0:
            appended = w if correction is None else w + correction
            gradient -= self.ridge * appended
            square += self.ridge * (appended * appended).sum(dim=1)
        return ResidualStats(gradient, square, product)

    def predicted(self, w: Tensor) -> Tensor:
        """wΦ, (rows, samples), in float64."""
        return torch.cat([w @ phi for phi, _ in self.chunks()], dim=1)

    def objective(self, w: Tensor, square: Tensor) -> Tensor:
        """(rows,) the objective at w, whose residual has this ‖θ‖²."""
        return 0.5 * square + self.lam * w.abs().sum(dim=1)


class ResidualStats(NamedTuple):
    """Of the residuals θ of a pass over the data: Φθ (rows, d), ‖θ‖² (rows,) and tᵀθ (rows,)."""

    gradient: Tensor
    square: Tensor
    product: Tensor


class ActiveSetSystems:
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
