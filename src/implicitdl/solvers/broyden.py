"""Broyden's method with a limited memory, per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._internal.errors import positive, positive_int, settle, wrong
from ..equations.map import Map
from .base import Solver, residual
from .search import Search
from .state import InverseEstimate, Rows, precise


@dataclass(slots=True)
class _Memory(Rows):
    search: Search
    S: Tensor  # (batch, memory, d)  unit steps s
    D: Tensor  # (batch, memory, d)  s − y = Js of each
    SS: Tensor  # (batch, memory, memory)
    SD: Tensor  # (batch, memory, memory)
    valid: Tensor  # (batch, memory)  which slots hold a pair
    best: Tensor  # (batch,)  smallest ‖r‖ since the last restart
    filled: int = 0


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method on r(x) = f(x) − x: x ← x + H r, H ≈ (I − J)⁻¹ from the last steps.

    The estimate B of I − J is the identity updated by the last m pairs (s, y), a step s and y = r_before − r_after,
    one after the other: B ← B + (y − Bs)sᵀ / sᵀs.  In compact form its inverse is

        H = I + (S − Y)(N + Sᵀ(Y − S))⁻¹Sᵀ,     N the upper triangle of SᵀS, columns in order of time,

    so that forgetting the oldest pair leaves exactly the estimate of the others.  H outlives the solve where an
    adjoint asks for it, as `InverseEstimate`.

    Arguments:
        memory: m, the number of pairs kept; two states of memory each.
        line_search: go on only where the residual falls, else halve the step and renew its direction.  Every trial is
            an evaluation of f and is counted as one.  It solves maps that expand; on one that is far from normal the
            residual has to rise on its way, and False takes fewer steps.
        growth: how far a residual may rise above the best before a plain step is taken and the memory is dropped;
            without a line search.
        rtol, atol, max_steps: as for `Solver`.

    Source: Broyden, A class of methods for solving nonlinear simultaneous equations (1965); the compact form is
    Byrd, Nocedal & Schnabel, Representations of quasi-Newton matrices and their use in limited memory methods (1994).

    Example:
        >>> import torch
        >>> from implicitdl import Broyden, fixed_point
        >>> solution = fixed_point(lambda x: 1 - 3 * x, torch.zeros(1, 1), solver=Broyden())
        >>> bool(solution.converged), round(float(solution.value), 4)  # where plain iteration diverges
        (True, 0.25)
    """

    memory: int = 10
    line_search: bool = True
    growth: float = 10.0

    by_residual: ClassVar[bool] = True

    @property
    def recovers(self) -> bool:
        return self.line_search

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive_int, "memory")
        settle(self, positive, "growth")
        if not isinstance(self.line_search, bool):
            raise wrong("Broyden", "line_search to be True or False", repr(self.line_search))

    def init(self, f: Map, x: Tensor) -> _Memory:
        batch, d = x.shape
        m, kept = self.memory, precise(x.dtype)
        return _Memory(
            search=Search.start(x),
            S=x.new_zeros(batch, m, d, dtype=kept),
            D=x.new_zeros(batch, m, d, dtype=kept),
            SS=x.new_zeros(batch, m, m, dtype=kept),
            SD=x.new_zeros(batch, m, m, dtype=kept),
            valid=x.new_zeros(batch, m, dtype=torch.bool),
            best=x.new_full((batch,), torch.inf, dtype=kept),
        )

    def step(self, f: Map, x: Tensor, fx: Tensor, state: _Memory) -> tuple[Tensor, _Memory, int]:
        search = state.search
        r, root = residual(f, x, fx), f.root
        if state.filled:
            self._remember(state, x - search.x, search.r - r)
        state.filled += 1
        if self.line_search:
            _, plain = search.judge(x, r, root=root)
        else:
            size = torch.linalg.vector_norm(r, dim=1)
            plain = ~(size <= self.growth * state.best)
            search.accept(torch.ones_like(plain), x, r, size)
            state.valid = state.valid & ~plain.unsqueeze(1)
            state.best = torch.where(plain, size, torch.minimum(size, state.best))
        # After a rejected trial the direction is renewed too: the trial has taught H something about it.
        search.p = self.inverse(state).apply(search.r)
        if not root:
            search.p = torch.where(plain.unsqueeze(1), search.r, search.p)
        return search.trial().to(fx.dtype), state, 0

    def inverse(self, state: _Memory) -> InverseEstimate:
        return InverseEstimate(state.D, state.S, _core(state))

    def _remember(self, state: _Memory, s: Tensor, y: Tensor) -> None:
        """Put the pair (s, y) in the place of the oldest.  A rejected trial is a pair like any other."""
        if torch.is_grad_enabled():  # Unrolled differentiates the steps: what a graph holds must not be overwritten
            state.S, state.D, state.SS, state.SD = (part.clone() for part in (state.S, state.D, state.SS, state.SD))
        # Broyden's update does not change when s and y are scaled together; unit steps keep the products comparable.
        length = torch.linalg.vector_norm(s, dim=1, keepdim=True)
        moved = length > 0
        length = torch.where(moved, length, 1.0)
        s, d = s / length, (s - y) / length
        finite = torch.isfinite(d).all(dim=1)
        s, d = (torch.where(finite.unsqueeze(1), part, 0.0) for part in (s, d))
        slot = (state.filled - 1) % self.memory
        state.S[:, slot], state.D[:, slot] = s, d
        across = torch.bmm(torch.stack((s, d), dim=1), state.S.transpose(1, 2))
        state.SS[:, slot], state.SS[:, :, slot] = across[:, 0], across[:, 0]
        state.SD[:, :, slot] = across[:, 1]
        state.SD[:, slot] = torch.bmm(s.unsqueeze(1), state.D.transpose(1, 2)).squeeze(1)
        state.valid = state.valid.clone()
        state.valid[:, slot] = finite & moved.squeeze(1)


def _core(state: _Memory) -> Tensor:
    """(N + Sᵀ(Y − S))⁻¹, zero in the rows and columns of slots that hold nothing."""
    memory = state.S.shape[1]
    # Slots are filled in turn: counted from the newest backwards, a larger age is an older pair.
    age = (state.filled - 2 - torch.arange(memory, device=state.S.device)) % memory
    upper = age.unsqueeze(1) >= age.unsqueeze(0)
    both = state.valid.unsqueeze(1) & state.valid.unsqueeze(2)
    empty = torch.diag_embed(~state.valid).to(state.SS.dtype)
    matrix = torch.where(both, torch.where(upper, state.SS, 0.0) - state.SD, empty)
    inverse, failed = torch.linalg.inv_ex(matrix)
    if torch.is_grad_enabled() and failed.any():  # the derivative of what does not exist is NaN, though it is not used
        unit = torch.eye(memory, dtype=matrix.dtype, device=matrix.device)
        inverse, _ = torch.linalg.inv_ex(matrix.where((failed == 0).view(-1, 1, 1), unit))
    # A singular B has no inverse: the sample takes the plain step, and its next pair may repair B.
    usable = both & (failed == 0).view(-1, 1, 1) & torch.isfinite(inverse)
    return torch.where(usable, inverse, 0.0)
