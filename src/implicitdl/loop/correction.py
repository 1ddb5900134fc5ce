"""The measure of g(x) = 0: the Newton correction, which knows neither the units of g nor those of x."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..equations.map import AutogradLinearization, LinearMap, Map
from ..solvers.newton import DENSE_UP_TO, newton_correction
from .indexing import on_device, on_host
from .residual import Residual, measurable, parts_of

# A step that is longer than this part of the one before does not come nearer any more.
_STANDING = 0.75


class Correction(Residual):
    """‖p‖ / ‖x‖ per row, p = J⁻¹g(x) the Newton correction: the relative distance to the root that is near.

    A solver that forms J knows p.  Of another the secant of its last two evaluations gives a guess,
    ‖g‖ ‖s‖ / ‖y‖.  Where this is within the tolerance p is computed once to confirm it; of a state too large for its J,
    the guess is made once more from an evaluation at a short step, ten times it must be within the tolerance, and
    every number of a row that has grown must act on g.

    A root at 0 has no relative distance.  Where rounding leaves steps that do not shorten and are nothing beside the
    numbers that x has been through, it has been found as exactly as they allow; else the loop tries 0 itself.

    For a linear equation, an adjoint's, it is ‖r‖ / ‖g‖, the residual relative to the right-hand side.
    """

    _before: np.ndarray | None = None  # (parts, batch)  ‖p‖ at the look before

    def __call__(
        self, f: Map, x: Tensor, fx: Tensor, norms: Any, rtol: float, atol: float,
        before: tuple[Tensor, Tensor] | None = None, exact: bool = False, probe: bool = False, leaps: bool = False,
        correction: Tensor | None = None,
    ) -> np.ndarray:  # fmt: skip
        dtype = fx.dtype
        state, self.probed = x.detach(), None
        # In double precision: float32 cannot square 1e-23, and a residual that is not 0 must not become it.
        x, r = measurable(f, x).double(), measurable(f, fx).double()
        # Nor does double precision square 1e-177.
        residual = on_host(torch.maximum(torch.linalg.vector_norm(r, dim=1), r.abs().amax(dim=1)))
        xs = parts_of(f, x)
        size = np.stack([on_host(torch.linalg.vector_norm(part, dim=1)) for part in xs])
        if self.first_size is None:
            self.first_size = np.where(size < np.inf, size, 0)
        if isinstance(f, LinearMap):
            self.vanishing, self._away = None, np.zeros(len(residual), dtype=bool)
            right = on_host(torch.linalg.vector_norm(measurable(f, f.constant), dim=1))
            rounding = np.zeros_like(residual) if correction is None else on_host(correction)
            # Of a J that is singular to working precision rounding may hide any residual, and excuses none.
            hidden = rounding > torch.finfo(dtype).eps ** 0.5 * right
            residual = np.where(hidden, np.maximum(residual, rounding), residual)
            return _ratio(residual, right + atol / rtol + np.where(hidden, 0.0, rounding) / rtol)
        guess = np.full_like(residual, np.inf)
        if before is not None:
            x_before, r_before = (measurable(f, part) for part in before)
            step = on_host(torch.linalg.vector_norm(x - x_before, dim=1))
            bend = on_host(torch.linalg.vector_norm(r - r_before, dim=1))
            guess = residual * step / bend
        if correction is not None:
            length = _lengths(f, correction)
        elif x.shape[1] <= DENSE_UP_TO and not torch.is_inference_mode_enabled():
            length = np.repeat(guess[None], len(size), axis=0)
            near = (length <= rtol * size + atol).all(axis=0) & (residual > 0)
            near |= (residual == 0) & (size > 2 * self.first_size).any(axis=0)
            if near.any():
                length[:, near] = _lengths(f, _confirmed(f, state))[:, near]
        else:
            # In many dimensions, a guess; a long step passes over what is near its end, a short one sees it.
            length = np.repeat(10 * guess[None], len(size), axis=0)
            near = np.asarray((length <= rtol * size + atol).all(axis=0))
            if before is not None and near.any():
                self.probed = near.astype(np.int64)
                length[:, near] = 10 * _beside(f, state, before[0].detach(), r, near)[near]
                near = np.asarray(near & (size > 2 * self.first_size).any(axis=0) & np.isfinite(length).all(axis=0))
                if near.any() and not torch.is_inference_mode_enabled():
                    self.probed = self.probed + near
                    length[:, near & _idle(f, state, 2 * self.first_size.max(axis=0))] = np.inf
        peak = size if self._peak is None else np.maximum(self._peak, size)
        self._peak = peak
        relative = length / (size + length + atol / rtol)
        relative = np.where(np.isfinite(length), relative, 1.0)
        if self._before is not None and correction is not None:
            standing = (length > _STANDING * self._before) & (length <= 4 * torch.finfo(dtype).eps * peak)
            relative = np.where(standing, np.minimum(relative, length / peak), relative)
        self._away = np.logical_or.reduce((size > 2 * self.first_size) & (relative > rtol) & (length > 0.01 * size))
        self._before = np.where(np.isfinite(length), length, np.inf)
        self.vanishing = (size <= rtol * peak) & (size > 0)
        # A zero is a root unless g and its slope have faded away on the way to it, as those of exp do for x → −∞.
        grown = (size > 2 * self.first_size).any(axis=0)
        zero = (residual == 0) & ~(grown & ~np.isfinite(length).all(axis=0))
        worst: np.ndarray = np.where(residual == 0, 1.0, relative.max(axis=0))
        return np.where(zero, 0.0, np.where(np.isfinite(residual), worst, np.inf))

    def fresh(self) -> Correction:
        return _Exactly(None)

    def take(self, live: np.ndarray) -> None:
        super().take(live)
        self._before = None if self._before is None else self._before[:, live]


class _Exactly(Correction):
    """Whether g(x) is 0."""

    def __call__(self, f: Map, x: Tensor, fx: Tensor, *settings: Any, **more: Any) -> np.ndarray:
        return np.where(on_host(fx.detach().abs().amax(dim=1)) == 0, 0.0, np.inf)


def _beside(f: Map, x: Tensor, towards: Tensor, r: Tensor, rows: np.ndarray) -> np.ndarray:
    """‖g‖ ‖s‖ / ‖y‖ with a short step s in the direction of another point, (batch,)."""
    away = towards - x
    short = torch.finfo(x.dtype).eps ** 0.5 * torch.linalg.vector_norm(x, dim=1, keepdim=True)
    s = away * (short / torch.linalg.vector_norm(away, dim=1, keepdim=True))
    moved = torch.where(on_device(rows[:, None], x), x + s, x)
    with torch.no_grad():
        bend = measurable(f, f(moved)).double() - r
    norms = [on_host(torch.linalg.vector_norm(t, dim=1)) for t in (r, measurable(f, moved).double() - x, bend)]
    guess: np.ndarray = norms[0] * norms[1] / norms[2]
    return guess


def _idle(f: Map, x: Tensor, size: np.ndarray) -> np.ndarray:
    """Whether a number beyond this size does not act on g at all, so that J is singular, (batch,)."""
    with torch.enable_grad():
        at = AutogradLinearization(f, x)
    weights = 0.5 + torch.rand(
        x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    acts = at.vjp(weights.to(x).expand_as(x)) != 0
    return on_host(((x.abs() > on_device(size[:, None], x)) & ~acts).any(dim=1)) > 0


def _confirmed(f: Map, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return newton_correction(f, x).detach()


def _lengths(f: Map, p: Tensor) -> np.ndarray:
    return np.stack([on_host(torch.linalg.vector_norm(part.double(), dim=1)) for part in parts_of(f, p)])


def _ratio(change: np.ndarray, size: np.ndarray) -> np.ndarray:
    ratio = np.where(change == 0, 0.0, change / size)
    return np.where(np.isnan(change) | np.isinf(change), np.inf, np.minimum(ratio, float(np.finfo(np.float32).max)))
