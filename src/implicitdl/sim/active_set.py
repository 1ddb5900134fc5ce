"""Active sets for all rows at once: Newton's method on the current signs, exact where the signs are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .problem import RowProblem, product

Record = TypeVar("Record", bound="RowRecord")

# Of the violators of a row, those within this share of the worst one enter together.
_SHARE = 0.1
# A gradient this far beyond λ + τ, relatively, is a violator and not rounding.
_BEYOND = 1e-9
# Lengths that are tried beyond the first change of sign: the whole step, then half of it.
_TRIALS = 2


class RowRecord:
    """A dataclass of tensors with one entry a row: indexing takes or sets some of the rows in every field."""

    def __getitem__(self: Record, rows: Tensor) -> Record:
        return self._mapped(lambda values: values[rows])

    def __setitem__(self: Record, rows: Tensor, part: Record) -> None:
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            getattr(self, name)[rows] = getattr(part, name)

    def to(self: Record, device: torch.device) -> Record:
        return self._mapped(lambda values: values.to(device))

    def _mapped(self: Record, f: Callable[[Any], Any]) -> Record:
        return type(self)(*(f(getattr(self, name)) for name in self.__dataclass_fields__))  # type: ignore[attr-defined]


@dataclass
class ActiveSets(RowRecord):
    """The point of every row and its active set: the face of the objective that the row is on.

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
    def at(cls, problem: RowProblem, w: Tensor, g: Tensor) -> ActiveSets:
        # A row within rounding of the sphere is on it.
        return cls(w, g, w.sign(), w[:, : problem.n].abs().sum(dim=1) >= problem.kappa * (1 - 1e-9))


def active_set(problem: RowProblem, rows: ActiveSets, steps: int) -> None:
    """Descend from the rows' points, each at most so many steps, and change the rows in place.

    On the face F of the signs σ the objective is quadratic, and with τ the multiplier of a tight ball its minimiser
    is w + d with

        G_FF d = g_F − λσ_F − τσ_a,   σ_aᵀd = 0.

    The step goes there, or to the first entry that would change sign, which leaves the face, or to the sphere of the
    ball.  Where dropping every entry that would change sign lowers the objective more, all leave at once.  At the
    minimiser of a face, a tight ball with τ < 0 is released, and entries off the face with |g_j| > λ + τ join it.
    Each step lowers the objective, so no face is met twice.

    Source: Lee, Battle, Raina & Ng, Efficient sparse coding algorithms (NIPS 2006), for the search over signs with
        one row and no ball.
    """
    stuck = torch.zeros_like(rows.tight)
    live = torch.arange(len(rows.w), device=rows.w.device)
    for _ in range(steps):
        if len(live) == 0:
            break
        part = rows[live]
        moved, done = _step(problem, part, stuck[live])
        rows[live] = part
        # Several newcomers may start in the wrong direction and leave again at once; the worst violator cannot.
        stuck[live] = ~moved
        live = live[~done]


def _step(problem: RowProblem, rows: ActiveSets, stuck: Tensor) -> tuple[Tensor, Tensor]:
    """One step of every row, in place; whether it moved, and whether it has ended."""
    n, lam, kappa, gram = problem.n, problem.lam, problem.kappa, problem.gram
    d, tau = newton(problem, rows)
    crossing = rows.sign * (rows.w + d) < 0
    at = torch.where(crossing, -rows.w / d, math.inf)
    to_sphere = _to_sphere(rows, d, n, kappa)
    t = torch.minimum(at.amin(dim=1), to_sphere).clamp(max=1.0)
    leaving = crossing & (at <= t.unsqueeze(1))
    landed = to_sphere <= t
    G_d = product(d, gram)
    change, G_change = t.unsqueeze(1) * d, t.unsqueeze(1) * G_d
    reach, undecided = 1.0, torch.nonzero(crossing.any(dim=1))[:, 0]
    for _ in range(_TRIALS):
        undecided = undecided[t[undecided] < reach]
        if len(undecided) == 0:
            break
        part = rows[undecided]
        bent = at[undecided] <= reach
        straight = reach * d[undecided]
        jump = torch.where(bent, -part.w, straight)
        G_jump = reach * G_d[undecided] + product(jump - straight, gram)
        size = (part.w + jump)[:, :n].abs().sum(dim=1)
        better = (size <= kappa) & (
            _rise(part, jump, G_jump, lam) < _rise(part, change[undecided], G_change[undecided], lam)
        )
        taken, at_ = undecided[better], better
        leaving[taken], change[taken], G_change[taken] = bent[at_], jump[at_], G_jump[at_]
        landed[taken] = False
        rows.tight[taken] &= size[at_] >= kappa * (1 - 1e-9)
        t[taken] = reach
        undecided = undecided[~better]
        reach /= 2
    rows.w = torch.where(leaving, 0.0, rows.w + change)
    rows.g = rows.g - G_change
    rows.sign = torch.where(leaving, 0.0, rows.sign)
    rows.tight = rows.tight | landed
    minimal = (t == 1) & ~leaving.any(dim=1) & ~landed
    return t > 0, minimal & ~_leave_face(rows, tau, minimal, stuck, n, lam)


def _to_sphere(rows: ActiveSets, d: Tensor, n: int, kappa: float) -> Tensor:
    """The step at which a row inside the ball meets its sphere; ∞ where the whole step stays inside."""
    speed = (rows.sign * d)[:, :n].sum(dim=1)
    room = (kappa - rows.w[:, :n].abs().sum(dim=1)).clamp(min=0)
    return torch.where(~rows.tight & (speed > room), room / speed, math.inf)


def _rise(rows: ActiveSets, change: Tensor, G_change: Tensor, lam: float) -> Tensor:
    """How much the objective rises by a change that keeps every sign or ends at 0."""
    return ((lam * rows.sign - rows.g + 0.5 * G_change) * change).sum(dim=1)


def _leave_face(rows: ActiveSets, tau: Tensor, minimal: Tensor, stuck: Tensor, n: int, lam: float) -> Tensor:
    """At the minimiser of a face: release a ball that holds back nothing, and let violators in.  Whether either did."""
    release = minimal & rows.tight & (tau < 0)
    rows.tight = rows.tight & ~release
    bound = torch.full_like(rows.g, lam)
    bound[:, :n] += tau.clamp(min=0).unsqueeze(1)
    excess = torch.where(rows.sign == 0, rows.g.abs() - bound * (1 + _BEYOND), 0.0)
    least = excess.amax(dim=1) * torch.where(stuck, 1.0, _SHARE)
    enter = (excess > 0) & (excess >= least.unsqueeze(1)) & minimal.unsqueeze(1)
    rows.sign = torch.where(enter, rows.g.sign(), rows.sign)
    return release | enter.any(dim=1)


def newton(problem: RowProblem, rows: ActiveSets) -> tuple[Tensor, Tensor]:
    """d and τ with G_FF d = g_F − λσ_F − τσ_a and σ_aᵀd = 0, from two solutions of one system; τ = 0 off the sphere."""
    n, lam, systems = problem.n, problem.lam, problem.systems
    support = rows.sign != 0
    descent = torch.where(support, rows.g - lam * rows.sign, 0.0).unsqueeze(1)
    if not bool(rows.tight.any()):
        return systems.solve(support, descent)[:, 0], torch.zeros_like(rows.w[:, 0])
    normal = torch.nn.functional.pad(rows.sign[:, :n] * rows.tight.unsqueeze(1), (0, rows.sign.shape[1] - n))
    free, along = systems.solve(support, torch.cat([descent, normal.unsqueeze(1)], dim=1), normal).unbind(dim=1)
    curvature = (normal * along).sum(dim=1)
    tau = torch.where(curvature > 0, (normal * free).sum(dim=1) / curvature, 0.0)
    return free - tau.unsqueeze(1) * along, tau
