"""Anderson acceleration, safeguarded, per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import positive_int
from ..equilibrium import RowMap
from .base import Solver, check_damping


class _History(NamedTuple):
    dR: Tensor  # (batch, memory, d)  differences of residuals
    dF: Tensor  # (batch, memory, d)  differences of f, so that the next iterate is one product
    gram: Tensor  # (batch, memory, memory)  dR dRᵀ, one row renewed a step
    valid: Tensor  # (batch, memory)  which slots hold a difference
    r: Tensor  # (batch, d)  the last residual, from step 1 on
    fx: Tensor  # (batch, d)  the last f(x), likewise
    best: Tensor  # (batch,)  smallest ‖r‖ since the last restart
    step: int


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration (type II): the affine combination of past iterates with the smallest residual.

    With differences of the last m residuals ΔR and of the last m values ΔF,
    γ = argmin ‖r − ΔRᵀγ‖ and x ← f(x) − ΔFᵀγ − (1 − damping)(r − ΔRᵀγ).

    The least squares is solved in normalised columns with a ridge relative to the dtype's rounding, so that it
    neither depends on the scale of the state nor slows easy maps down.  A sample whose residual grows beyond
    ``growth`` times its best restarts from a plain step with an empty memory.

    Arguments:
        memory: m, the number of differences kept.
        damping: weight of the residual in the step (Anderson's β); values above 1 are allowed.
        growth: how far a residual may rise above the best before the memory is dropped.
        rtol, atol, max_steps: as for `Solver`.

    Source: Walker & Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49 (2011), eq. (3.1).

    Example:
        >>> import torch
        >>> from implicitdl import Anderson, fixed_point
        >>> solution = fixed_point(lambda x: 1 + 0.99 * x, torch.zeros(1, 1), solver=Anderson())
        >>> bool(solution.converged), int(solution.steps) < 6
        (True, True)
    """

    memory: int = 5
    damping: float = 1.0
    growth: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int("Anderson", "memory", self.memory)
        check_damping("Anderson", self.damping)

    def init(self, f: RowMap, x: Tensor) -> _History:
        batch, d = x.shape
        m, kept = self.memory, _precise(x.dtype)
        return _History(
            dR=x.new_zeros(batch, m, d, dtype=kept),
            dF=x.new_zeros(batch, m, d, dtype=kept),
            gram=x.new_zeros(batch, m, m, dtype=kept),
            valid=x.new_zeros(batch, m, dtype=torch.bool),
            r=x,
            fx=x,
            best=x.new_full((batch,), float("inf"), dtype=kept),
            step=0,
        )

    def step(self, f: RowMap, x: Tensor, fx: Tensor, state: _History) -> tuple[Tensor, _History, int]:
        out_dtype = fx.dtype
        fx = fx.to(state.dR.dtype)
        r = fx - x
        size = torch.linalg.vector_norm(r, dim=1)
        if state.step == 0:
            return self._damped(fx, r).to(out_dtype), state._replace(r=r, fx=fx, best=size, step=1), 0

        dR, dF, gram, valid = state.dR, state.dF, state.gram, state.valid
        if torch.is_grad_enabled():  # Unrolled differentiates the steps: what a graph holds must not be overwritten
            dR, dF, gram, valid = dR.clone(), dF.clone(), gram.clone(), valid.clone()
        slot = (state.step - 1) % self.memory
        dR[:, slot] = r - state.r
        dF[:, slot] = fx - state.fx
        restart = ~(size <= self.growth * state.best)
        valid[restart] = False
        valid[:, slot] = ~restart
        # A row times a transpose: far faster in MKL's batched product than a matrix times a column.
        across = dR.transpose(1, 2)
        row = torch.bmm(dR[:, slot : slot + 1], across).squeeze(1)
        gram[:, slot, :] = row
        gram[:, :, slot] = row
        gamma = _least_squares(gram, torch.bmm(r.unsqueeze(1), across).squeeze(1), valid)
        step = self._damped(fx, r)
        moved = dF if self.damping == 1.0 else dF - (1.0 - self.damping) * dR
        x = torch.baddbmm(step.unsqueeze(1), gamma.unsqueeze(1), moved, alpha=-1.0).squeeze(1)
        best = torch.where(restart, size, torch.minimum(size, state.best))
        return x.to(out_dtype), _History(dR, dF, gram, valid, r, fx, best, state.step + 1), 0

    def take(self, state: _History, rows: Tensor) -> _History:
        parts = {name: part[rows] for name, part in state._asdict().items() if name != "step"}
        return _History(**parts, step=state.step)

    def _damped(self, fx: Tensor, r: Tensor) -> Tensor:
        return fx if self.damping == 1.0 else fx - (1.0 - self.damping) * r


def _precise(dtype: torch.dtype) -> torch.dtype:
    """Differences of nearby iterates lose their digits in half precision; they are kept in float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _least_squares(gram: Tensor, rhs: Tensor, valid: Tensor) -> Tensor:
    """γ of argmin ‖r − ΔRᵀγ‖ from G = ΔR ΔRᵀ and ΔR r, ignoring slots that hold nothing."""
    scale = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    use = valid & (scale > 0)
    inverse = torch.where(use, scale.clamp(min=torch.finfo(scale.dtype).tiny).reciprocal(), 0.0)
    normal = gram * inverse.unsqueeze(1) * inverse.unsqueeze(2)
    # The rounding of a scalar product of unit vectors: below it a direction of the memory is noise.
    ridge = 10 * torch.finfo(gram.dtype).eps
    normal = normal.double()
    normal.diagonal(dim1=1, dim2=2).copy_(torch.where(use, 1.0 + ridge, 1.0).double())
    factor, failed = torch.linalg.cholesky_ex(normal)
    gamma = torch.cholesky_solve((rhs * inverse).double().unsqueeze(2), factor).squeeze(2)
    # A sample whose memory is degenerate beyond the ridge takes the plain step.
    return torch.where((failed == 0).unsqueeze(1), gamma, 0.0).to(rhs.dtype) * inverse
