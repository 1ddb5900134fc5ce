"""Anderson acceleration, safeguarded, per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._internal.errors import positive, positive_int, settle
from ..equations.map import Map
from ..kernels.anderson import Memory
from .base import Solver, damping
from .state import precise


class _History(NamedTuple):
    dR: Tensor  # (batch, memory + 2, d)  differences of residuals, then the last two residuals, which take turns
    dF: Tensor  # (batch, memory, d)  differences of f, so that the next iterate is one product
    gram: Tensor  # (batch, memory, memory)  dR dRᵀ, one row renewed a step
    valid: Tensor  # (batch, memory)  which slots hold a difference
    fx: Tensor  # (batch, d)  the last f(x), from step 1 on
    best: Tensor  # (batch,)  smallest ‖r‖ since the last restart
    step: int


# None where torch's operations will begin.
_State: TypeAlias = _History | Memory | None


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
        settle(self, positive_int, "memory")
        settle(self, positive, "growth")
        settle(self, damping, "damping")

    def init(self, f: Map, x: Tensor) -> Memory | None:
        return Memory.of(x, self.memory, self.growth, self.damping)

    def norms(self, x: Tensor, fx: Tensor, state: _State) -> tuple[Tensor, Tensor] | None:
        return state.look(x, fx) if isinstance(state, Memory) and state.serves(x, fx) else None

    def step(self, f: Map, x: Tensor, fx: Tensor, state: _State) -> tuple[Tensor, _State, int]:
        if isinstance(state, Memory) and state.serves(x, fx):
            return state.step(x, fx), state, 0
        # Values that are not what was expected of f begin again by torch's operations.
        history = state if isinstance(state, _History) else self._empty(fx)
        return *self._step(x, fx, history), 0

    def take(self, state: _State, rows: Tensor) -> _State:
        if state is None:
            return None
        if isinstance(state, Memory):
            return state.take(rows)
        parts = {name: part.index_select(0, rows) for name, part in state._asdict().items() if name != "step"}
        return _History(**parts, step=state.step)

    def _empty(self, fx: Tensor) -> _History:
        batch, d = fx.shape
        m, kept = self.memory, precise(fx.dtype)
        return _History(
            dR=fx.new_empty(batch, m + 2, d, dtype=kept),  # read only where filled
            dF=fx.new_empty(batch, m, d, dtype=kept),
            gram=fx.new_zeros(batch, m, m, dtype=kept),
            valid=fx.new_zeros(batch, m, dtype=torch.bool),
            fx=fx,
            best=fx.new_full((batch,), float("inf"), dtype=kept),
            step=0,
        )

    def _step(self, x: Tensor, fx: Tensor, state: _History) -> tuple[Tensor, _History]:
        out_dtype = fx.dtype
        fx = fx.to(state.dR.dtype)
        dR, dF, gram, valid = state.dR, state.dF, state.gram, state.valid
        if torch.is_grad_enabled():  # Unrolled differentiates the steps: what a graph holds must not be overwritten
            dR, dF, gram, valid = dR.clone(), dF.clone(), gram.clone(), valid.clone()
        turn, last = self.memory + state.step % 2, self.memory + (state.step - 1) % 2
        _difference(fx, x, out=dR[:, turn])
        r = dR[:, turn]
        size = torch.linalg.vector_norm(r, dim=1)
        if state.step == 0:
            return self._damped(fx, r).to(out_dtype), state._replace(dR=dR, fx=fx, best=size, step=1)

        slot, filled = (state.step - 1) % self.memory, min(state.step, self.memory)
        _difference(r, dR[:, last], out=dR[:, slot])
        _difference(fx, state.fx, out=dF[:, slot])
        restart = ~(size <= self.growth * state.best)
        valid[restart] = False
        valid[:, slot] = ~restart
        # The new difference and r against the memory, which on a large state is most of a step's traffic: read once.
        # Rows times a transpose are far faster in MKL's batched product than a matrix times columns.
        used, pair = dR[:, :filled], dR[:, slot :: turn - slot][:, :2]
        rows = torch.bmm(pair, used.transpose(1, 2))
        gram[:, slot, :filled] = rows[:, 0]
        gram[:, :filled, slot] = rows[:, 0]
        gamma = _least_squares(gram[:, :filled, :filled], rows[:, 1], valid[:, :filled])
        step, moved = self._damped(fx, r), dF[:, :filled]
        if self.damping != 1.0:
            moved = moved - (1.0 - self.damping) * used
        x = torch.baddbmm(step.unsqueeze(1), gamma.unsqueeze(1), moved, alpha=-1.0).squeeze(1)
        best = torch.where(restart, size, torch.minimum(size, state.best))
        return x.to(out_dtype), _History(dR, dF, gram, valid, fx, best, state.step + 1)

    def _damped(self, fx: Tensor, r: Tensor) -> Tensor:
        return fx if self.damping == 1.0 else fx - (1.0 - self.damping) * r


def _difference(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a − b into a tensor that exists; where a graph is built `out=` is not allowed, and a temporary is needed."""
    if torch.is_grad_enabled():
        out.copy_(a - b)
    else:
        torch.sub(a, b, out=out)


def _least_squares(gram: Tensor, rhs: Tensor, valid: Tensor) -> Tensor:
    """γ of argmin ‖r − ΔRᵀγ‖ from G = ΔR ΔRᵀ and ΔR r, ignoring slots that hold nothing."""
    square = gram.diagonal(dim1=1, dim2=2)
    use = valid & (square > 0)
    # 1 in the place of what is not used: the derivative of a root is infinite at 0, also where nothing is made of it.
    inverse = torch.where(use, torch.where(use, square, 1.0).rsqrt(), 0.0)
    normal = gram * inverse.unsqueeze(1) * inverse.unsqueeze(2)
    # The rounding of a scalar product of unit vectors: below it a direction of the memory is noise.
    ridge = 10 * torch.finfo(gram.dtype).eps
    normal = normal.double()
    normal.diagonal(dim1=1, dim2=2).copy_(1.0 + ridge * use.double())
    factor, failed = torch.linalg.cholesky_ex(normal)
    gamma = torch.cholesky_solve((rhs * inverse).double().unsqueeze(2), factor).squeeze(2)
    # A sample whose memory is degenerate beyond the ridge takes the plain step.
    return torch.where((failed == 0).unsqueeze(1), gamma, 0.0).to(rhs.dtype) * inverse
