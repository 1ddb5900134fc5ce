"""Picard iteration with a vector Aitken step now and then: nearly its price, much of the speed of Anderson."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import positive_int, settle, wrong
from ..equations.map import Map
from ..kernels import loops as kernel
from .base import Solver

_KINDS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
_TINY = {kind: torch.finfo(kind).tiny for kind in _KINDS}
# A residual that all but repeats itself differs by rounding: a step of half the digits' worth is the longest one.
_LONGEST = {kind: torch.finfo(kind).eps ** -0.5 for kind in _KINDS}


@dataclass(slots=True)
class _Memory:
    place: int  # of the sweep within its period
    period: int
    r: Tensor  # (batch, d)  residual of the sweep before


@dataclass(frozen=True, kw_only=True)
class Aitken(Solver):
    """x ← f(x), and every ``period`` sweeps the extrapolation of the last two residuals, per sample.

    With r = f(x) − x and the difference d to the residual of the sweep before, γ = d·r / d·d minimises ‖r − γd‖, and
    x ← f(x) − γr.  For an affine f the new residual is r − γd exactly, so the step never does harm, and it removes
    the component of a single dominant real eigenvalue altogether, which is what trained implicit models have.  It is
    Anderson acceleration with a memory of one, taken periodically, at the price of a few vector operations.

    Arguments:
        period: sweeps from one extrapolation to the next, at least 2; by default the interval at which the map has
            its residual looked at, and 3 at least.
        rtol, atol, max_steps: as for `Solver`.

    Source: Irons & Tuck, A version of the Aitken accelerator for computer iteration (1969); taken periodically as in
    Banerjee, Suryanarayana & Pask, Periodic Pulay method (2016).

    Example:
        >>> import torch
        >>> from implicitdl import Aitken, Picard, fixed_point
        >>> f = lambda x: 1 + 0.9 * x
        >>> [int(fixed_point(f, torch.zeros(1, 1), solver=s).steps) for s in (Picard(), Aitken())]
        [89, 5]
    """

    period: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive_int, "period")
        if self.period == 1:
            raise wrong("Aitken", "period to be an integer of at least 2", 1)

    def check_interval(self, f: Map) -> int:
        return f.check_interval

    def init(self, f: Map, x: Tensor) -> _Memory:
        return _Memory(1, self.period or max(3, f.check_interval), x)

    def step(self, f: Map, x: Tensor, fx: Tensor, state: _Memory) -> tuple[Tensor, _Memory, int]:
        place = state.place
        state.place = place + 1
        if place < state.period - 1:
            return fx, state, 0
        if place == state.period - 1:
            state.r = fx - x
            return fx, state, 0
        state.place = 1
        return _extrapolate(x, fx, state.r), state, 0

    def take(self, state: _Memory, rows: Tensor) -> _Memory:
        return _Memory(state.place, state.period, state.r.index_select(0, rows))


def _extrapolate(x: Tensor, fx: Tensor, before: Tensor) -> Tensor:
    dtype = fx.dtype
    if dtype in _TINY:
        following = kernel.aitken(x, fx, before, _TINY[dtype], _LONGEST[dtype])
        if following is not None:
            return following
    if dtype in (torch.bfloat16, torch.float16):
        x, fx, before = x.float(), fx.float(), before.float()
    r = fx - x
    d = r - before
    # d = 0 is a residual that repeats itself, and there is nothing to extrapolate.
    size = (d * d).sum(dim=1, keepdim=True).clamp_(min=_TINY[d.dtype])
    longest = _LONGEST[dtype]
    # Squares that overflow make it 0: a plain step, until the loop looks and takes the sample to other units.
    gamma = (d * r).sum(dim=1, keepdim=True).div_(size).nan_to_num_(0.0).clamp_(-longest, longest)
    return torch.addcmul(fx, gamma, r, value=-1).to(dtype)
