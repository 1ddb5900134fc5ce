"""Arnoldi's process in batched form, by evaluations of f alone: each sample at its own place in its own cycle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import wrong
from .search import Search
from .state import Rows, precise


@dataclass(slots=True)
class Krylov(Rows):
    """A Krylov space of M = I − J at the search's point, in which ‖r − Mp‖ is made small.

    One product is one evaluation, at a probe beside the point: Mq = (r(x) − r(x + hq)) / h, exact up to rounding for
    an affine f and any h, and to first order in h for another.  With MQ_j = Q_{j+1}H the p of smallest residual is Qy,
    y = argmin ‖ ‖r‖e₁ − Hy ‖.  Its residual is known without y: with ν the null vector of Hᵀ, ν₁ = 1, it is ‖r‖ / ‖ν‖,
    and every new column of H gives the next entry of ν.
    """

    search: Search
    Q: Tensor  # (batch, m + 1, d)  orthonormal; zero where not yet filled
    H: Tensor  # (batch, m + 1, m)
    nu: Tensor  # (batch, m + 1)
    place: Tensor  # (batch,)  which vector of Q is probed; −1 where the point itself, or a step p, is tried
    h: Tensor  # (batch,)  length of the probe
    enough: Tensor  # (batch,)  residual at which the cycle ends
    left: int  # evaluations that the budget allows after the present one

    @staticmethod
    def start(x: Tensor, dimension: int, budget: int) -> Krylov:
        batch, d = x.shape
        kept = precise(x.dtype)
        m = min(dimension, d)
        return Krylov(
            search=Search.start(x),
            Q=x.new_zeros(batch, m + 1, d, dtype=kept),
            H=x.new_zeros(batch, m + 1, m, dtype=kept),
            nu=x.new_zeros(batch, m + 1, dtype=kept),
            place=torch.full((batch,), -1, dtype=torch.int64, device=x.device),
            h=x.new_zeros(batch, dtype=kept),
            enough=x.new_zeros(batch, dtype=kept),
            left=budget - 1,
        )

    @property
    def tried(self) -> Tensor:
        """Which samples were evaluated at the end of a cycle, and not at a probe."""
        return self.place < 0

    def begin(self, which: Tensor, h: Tensor, enough: Tensor) -> None:
        """Start a cycle at the search's point, for the samples marked."""
        rows = which.nonzero().squeeze(1)
        self.Q[rows], self.H[rows], self.nu[rows] = 0.0, 0.0, 0.0
        # Columns that are never reached are unit vectors of their own, so that H has full rank; y is zero there.
        self.H.diagonal(offset=-1, dim1=1, dim2=2)[rows] = 1.0
        self.Q[rows, 0] = self.search.r[rows] / self.search.size[rows].unsqueeze(1)
        self.nu[rows, 0] = 1.0
        self.place[rows] = 0
        self.h, self.enough = torch.where(which, h, self.h), torch.where(which, enough, self.enough)

    def extend(self, r: Tensor) -> None:
        """Take in the residuals r at the probes, and give the search a step where the cycle is over."""
        rows = (self.place >= 0).nonzero().squeeze(1)
        if not rows.numel():
            return
        place = self.place[rows]
        used = int(place.max()) + 1
        w = (self.search.r[rows] - r[rows]) / self.h[rows].unsqueeze(1)
        length = torch.linalg.vector_norm(w, dim=1)
        basis = self.Q[rows, :used]
        column = w.new_zeros(len(rows), used)
        # Classical Gram–Schmidt, twice: as stable as the modified one, and two batched products in place of a loop.
        for _ in range(2):
            along = torch.bmm(basis, w.unsqueeze(2)).squeeze(2)
            w = torch.baddbmm(w.unsqueeze(1), along.unsqueeze(1), basis, alpha=-1.0).squeeze(1)
            column += along
        rest = torch.linalg.vector_norm(w, dim=1)
        # Nothing but rounding is left: the space holds the solution.
        ends = ~(rest > 10 * torch.finfo(w.dtype).eps * length)
        rest = torch.where(ends, 0.0, rest)
        self.H[rows, :used, place] = column
        self.H[rows, place + 1, place] = rest
        self.Q[rows, place + 1] = torch.where(ends.unsqueeze(1), 0.0, w / rest.unsqueeze(1))
        self.nu[rows, place + 1] = torch.where(ends, torch.inf, -(column * self.nu[rows, :used]).sum(dim=1) / rest)
        self.place[rows] = place + 1
        residual = self.search.size[rows] / torch.linalg.vector_norm(self.nu[rows], dim=1)
        over = ~(residual > self.enough[rows]) | (place + 1 == self.H.shape[2])
        # The last evaluation that the budget allows is spent on a step, not on a probe.
        self._finish(rows if self.left <= 1 else rows[over])

    def _finish(self, rows: Tensor) -> None:
        if not rows.numel():
            return
        Qh, R = torch.linalg.qr(self.H[rows])
        beta = self.search.size[rows].view(-1, 1, 1)
        y = torch.linalg.solve_triangular(R, beta * Qh[:, :1].transpose(1, 2), upper=True)
        p = torch.bmm(y.transpose(1, 2), self.Q[rows, :-1]).squeeze(1)
        # Where M is singular on the space there is no y, and the plain step is taken.
        found = torch.isfinite(p).all(dim=1, keepdim=True)
        self.search.p = self.search.p.index_put((rows,), torch.where(found, p, self.search.r[rows]))
        self.search.t[rows] = 1.0
        self.place[rows] = -1

    def point(self) -> Tensor:
        """Where to evaluate next: x + hq where a sample is in a cycle, x + tp where it tries a step."""
        self.left -= 1
        q = self.Q[torch.arange(len(self.Q), device=self.Q.device), self.place.clamp(min=0)]
        probing = (~self.tried).unsqueeze(1)
        length = torch.where(probing, self.h.unsqueeze(1), self.search.t.unsqueeze(1))
        return torch.addcmul(self.search.x, length, torch.where(probing, q, self.search.p))


def refuse_graph(who: str, fx: Tensor) -> None:
    """A Krylov space is built in place, and nobody wants the derivative of its basis."""
    if fx.requires_grad:
        raise wrong(
            who, "a solve outside autograd", "one that is differentiated step by step",
            "Use ImplicitAdjoint() in place of Unrolled().",
        )  # fmt: skip
