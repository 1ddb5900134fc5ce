"""The relative residual, by which a sample is done, and what a small one does not show."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..equations.map import Map
from ..kernels import loops as kernel
from .indexing import on_device, on_host, select

# A step, or a residual, of fewer roundings of f(x) than this may be nothing but rounding.
_HIDDEN = 4
# Growth over the first step from which on hidden steps, and steps of any length, are not taken for the last ones.
_FAR = 8
# Norms from here on have squares that are neither zero nor without digits.
_SMALLEST = {kind: torch.finfo(kind).tiny ** 0.5 / torch.finfo(kind).eps for kind in (torch.float32, torch.float64)}


class Residual:
    """‖f(x) − x‖₂ / (atol/rtol + ‖f(x)‖₂) per row, at least in float32; inf where f(x) is not finite.

    Of a state in parts it is the largest of theirs, so that no part hides behind a larger one.

    If a state grows without bound, as that of x + 1 or √(x² + 1) does, its relative residual becomes small at some
    step, although no solution is near: ‖x‖ is simply large.  A row that has grown must therefore be near a solution
    too.  Let s be the last step, and y the change of f(x) − x over that step.  Then a solution is about
    ‖f(x) − x‖ ‖s‖ / ‖y‖ away, which must be at most √rtol of the state's size.  The residual of a row that fails is
    this distance relative to the size, and 1 at most.

    A method that extrapolates may leap to where rounding hides every step: in float64 x + 1 is x from 1e16 on.  Such a
    row is evaluated once more, halfway to 0.  Between the two points f(x) − x changes by about (1 − J) x/2.  Where J is
    not 1 along the way, that is far more than rounding.  So a number that shows no change still drifts, and is no
    solution.

    Arguments:
        first_size: (parts, batch)  ‖f(x)‖ where the solve began, if it has.

    Attributes:
        probed: (batch,)  extra evaluations that the last call made for each row; None if there were none.
        vanishing: (parts, batch)  which parts had become so small at the last call that 0 may be the solution.
    """

    def __init__(self, first_size: np.ndarray | None) -> None:
        self.first_size = first_size
        self.vanishing: np.ndarray | None = None
        self.probed: Any = None
        self._first_step: np.ndarray | None = None  # (parts, batch)  ‖f(x) − x‖ where the solve began
        self._most: np.ndarray | None = None  # (parts, batch)  ‖f(x) − x‖ at any look
        self._peak: np.ndarray | None = None  # (parts, batch)  ‖f(x)‖ at any look, since 0 was last tried
        self._away: np.ndarray | None = None  # (batch,)  whether the row runs away, at the last look that was finite
        self._doubted: np.ndarray | None = None  # (parts, batch)  at the last claim that steps could judge
        self._difference: Tensor | None = None

    def begin(self, f: Map, x: Tensor, fx: Tensor) -> None:
        """Note the sizes of the first f(x) and of the first step, where they are not looked at."""
        x, fx = measurable(f, x), measurable(f, fx)
        figures = [self._norms(*pair) for pair in zip(parts_of(f, x), parts_of(f, fx), strict=True)]
        change, size = (np.stack([part[i].double().cpu().numpy() for part in figures]) for i in (0, 1))
        self._first_step = np.where(change < np.inf, change, 0)
        if self.first_size is None:
            self.first_size = np.where(size < np.inf, size, 0)

    def __call__(
        self, f: Map, x: Tensor, fx: Tensor, norms: tuple[Tensor, Tensor] | None, rtol: float, atol: float,
        before: tuple[Tensor, Tensor] | None = None, exact: bool = False, probe: bool = False, leaps: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """At x, with f(x), and ‖f(x) − x‖ and ‖f(x)‖ where somebody knows them.

        Arguments:
            before: x and f(x) of the evaluation before, if there was one.
            probe: evaluate f at f(x) too where a claim has to be judged.  Methods that try points need it: their last
                evaluation may be far away.
            exact: x was found without iteration, and its growth shows nothing.
            leaps: the method may have gone in one step to where rounding hides the steps of f.
        """
        dtype, floor, state, following = fx.dtype, atol / rtol, x.detach(), fx.detach()
        x, fx = measurable(f, x), measurable(f, fx)
        xs, values = parts_of(f, x), parts_of(f, fx)
        figures = [norms or self._norms(*pair) for pair in zip(xs, values, strict=True)]
        change, size = (np.stack([part[i].double().cpu().numpy() for part in figures]) for i in (0, 1))
        relative = change / (size + floor)
        smallest = _SMALLEST[fx.dtype]
        # Norms may have overflowed in the dtype of the state.
        if not (size.min() > smallest and (size + change).max() < np.inf):
            extreme = ~((size > smallest) & (size + change < np.inf))
            for part, which in enumerate(extreme):
                if which.any():
                    scaled = _scaled_figures(select(xs[part], which), select(values[part], which), floor)
                    relative[part, which], size[part, which], change[part, which] = scaled
        if self.first_size is None:
            self.first_size = np.where(size < np.inf, size, 0)
        if self._most is None or self._peak is None:
            self._most = np.zeros_like(change) if self._first_step is None else self._first_step
            self._peak = self.first_size.copy()
            self._doubted = np.zeros(change.shape, dtype=bool)
        if self._first_step is None:
            self._first_step = np.where(change < np.inf, change, 0)
        finite = change < np.inf
        # Of a state so large that rounding hides its steps, their length says nothing.
        told = finite & (change > _HIDDEN * torch.finfo(dtype).eps * size)
        self._most = np.where(told, np.maximum(self._most, change), self._most)
        self._peak = np.where(finite, np.maximum(self._peak, size), self._peak)
        self.vanishing = (size <= rtol * self._peak) & (size > 0)
        away = np.logical_or.reduce((size > 2 * self.first_size) & (change > 0.999 * self._most))
        self._away = away if self._away is None else np.where(finite.all(axis=0), away, self._away)
        self.probed = None
        arrived: np.ndarray = np.asarray(relative <= rtol) & (size > 2 * self.first_size)
        if arrived.any() and not exact:
            hidden: np.ndarray = change <= _HIDDEN * torch.finfo(dtype).eps * (size + floor)
            beyond, told = None, (arrived & ~hidden).any(axis=0)
            if probe and told.any():  # of hidden steps it would tell nothing
                self.probed = told.astype(np.int64)
                with torch.no_grad():
                    beyond = measurable(f, f(following))
            # Of a part, the evaluation before tells only where the other parts have not moved much: in small steps.
            seen = None if probe and len(xs) > 1 else before
            for part, which in enumerate(arrived):
                if which.any():
                    self._doubt(f, part, which, xs, values, seen, beyond, change, size, relative, rtol, floor, dtype)
            if leaps:
                far = arrived & (size > _FAR * self._first_step) & (hidden | (rtol**0.5 * size > self._first_step))
                # Of the whole row, and of states whose norms can be squared.
                far &= (relative <= rtol).all(axis=0) & (size > smallest)
                if far.any():
                    walks = self._walk(f, far.any(axis=0), state, xs, values, rtol, torch.finfo(dtype).eps)
                    relative[far & walks] = 1.0
                    self._doubted |= far & walks
                    self._away |= walks
        return relative[0] if len(relative) == 1 else relative.max(axis=0)

    def _walk(
        self, f: Map, rows: np.ndarray, state: Tensor, xs: list[Tensor], values: list[Tensor], rtol: float, eps: float
    ) -> np.ndarray:  # fmt: skip
        """Which of the rows hold a number that f moves nowhere nearer to a solution, (batch,).

        First x moves along the ray to 0, and the change tells how near a solution is, as that of a step does.  This can
        be wrong: two numbers may be copies that move together, or f may be a rotation, whose f(x) − x is orthogonal to
        x.  So doubtful rows are tried once more, with a random factor for each number; the seed is fixed.
        """
        assert self.first_size is not None, "seen by the caller"
        suspected, walks = None, np.zeros_like(rows)
        drawn = torch.rand(
            state.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
        )
        for share in (torch.full_like(drawn, 0.5), 0.25 + 0.5 * drawn):
            moved = torch.where(on_device(rows[:, None], state), state * share.to(state), state)
            with torch.no_grad():
                beside = parts_of(f, measurable(f, f(moved)))
            self.probed = rows if self.probed is None else self.probed + rows
            still, distant = [], np.ones_like(rows)
            for x, fx, x_beside, fx_beside, first in zip(
                xs, values, parts_of(f, measurable(f, moved)), beside, self.first_size, strict=True
            ):
                r, least = fx - x, _HIDDEN * eps
                bend = (fx_beside - x_beside) - r
                size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
                grown = x.abs() > 2 * on_device(first[:, None], x)
                along = ((x / size) * bend).sum(dim=1, keepdim=True).abs() <= least * size
                still.append(torch.cat((grown & (bend.abs() <= least * x.abs()), along & (size > 0)), dim=1))
                left, step, change = (on_host(torch.linalg.vector_norm(t, dim=1)) for t in (r, x - x_beside, bend))
                distant &= ~((left / on_host(size) + eps) * step <= rtol**0.5 * change)
            marks = torch.cat(still, dim=1)
            if suspected is not None:
                return walks | (rows & (on_host((marks & suspected).any(dim=1)) > 0))
            walks, suspected = rows & distant, marks
            rows = rows & ~walks & (on_host(marks.any(dim=1)) > 0)
            if not rows.any():
                return walks
        raise AssertionError("two evaluations tell")

    def _doubt(
        self, f: Map, part: int, which: np.ndarray, xs: list[Tensor], values: list[Tensor],
        before: tuple[Tensor, Tensor] | None, beyond: Tensor | None, change: np.ndarray, size: np.ndarray,
        relative: np.ndarray, rtol: float, floor: float, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Raise the residual of grown rows that are within their tolerance and far from a solution."""
        assert self._most is not None, "seen by the caller"
        assert self._away is not None, "seen by the caller"
        assert self._doubted is not None, "seen by the caller"
        change, size, most = change[part, which], size[part, which] + floor, self._most[part, which]
        eps = torch.finfo(dtype).eps
        distance = np.full_like(size, np.inf)
        # Within rounding steps say nothing: what was in doubt stays so, and others must have had longer ones.
        silent = np.ones_like(which[which])
        x, fx = select(xs[part], which), select(values[part], which)
        if before is not None:
            x_before, fx_before = (select(parts_of(f, measurable(f, t))[part], which) for t in before)
            step = on_host(torch.linalg.vector_norm(x - x_before, dim=1))
            bend = on_host(torch.linalg.vector_norm((fx - x) - (fx_before - x_before), dim=1))
            silent = ~(step > _HIDDEN * eps * size)
            distance = (change + eps * size) * step / bend
        if beyond is not None and len(xs) == 1:
            bend = on_host(torch.linalg.vector_norm((select(beyond, which) - fx) - (fx - x), dim=1))
            # So near, what rounding may have bent is no sign of a solution.
            along = (change + eps * size) * change / np.maximum(bend - 2 * eps * size, 0.0)
            told = change > _HIDDEN * eps * size
            distance = np.where(told, np.fmax(along, np.where(silent, 0.0, distance)), distance)
            silent &= ~told
        standing = (most > 0) & (rtol * size > most) & (change + 4 * eps * size > 0.5 * most)
        doubtful = np.where(silent, standing | self._doubted[part, which], ~(distance <= rtol**0.5 * size))
        share = np.where(silent, 1.0, np.clip(distance / size, rtol**0.5, 1.0))
        relative[part, which] = np.where(doubtful, np.maximum(share, 2 * rtol), relative[part, which])
        self._away[which] |= doubtful
        self._doubted[part, which] = doubtful

    def fresh(self) -> Residual:
        """One that knows nothing of the way, for a point beside it."""
        return Residual(None)

    @property
    def away(self) -> np.ndarray:
        """Which rows have grown and take steps as long as ever, or seem to approach a solution at infinity."""
        assert self._away is not None, "asked after a look"
        return self._away

    def tried_zero(self, part: int, which: np.ndarray) -> None:
        """0 is no solution yet of this part: it is tried again when the part has shrunk as much once more."""
        assert self._peak is not None, "asked after a look"
        self._peak[part, which] = 0.0

    def take(self, live: np.ndarray) -> None:
        """Go on with some of the rows."""
        self.first_size, self._first_step, self._most, self._peak, self._away, self._doubted = (
            None if figures is None else figures[..., live]
            for figures in (self.first_size, self._first_step, self._most, self._peak, self._away, self._doubted)
        )

    def _norms(self, x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor]:
        known = kernel.norms(x, fx)
        if known is not None:
            return known
        # On a large state a fresh tensor costs several times the subtraction that fills it.
        if self._difference is None or self._difference.shape != fx.shape:
            self._difference = torch.empty_like(fx)
        torch.sub(fx, x, out=self._difference)
        return torch.linalg.vector_norm(self._difference, dim=1), torch.linalg.vector_norm(fx, dim=1)


def parts_of(f: Map, x: Tensor) -> list[Tensor]:
    """Each part of a state, in rows."""
    return [x] if f.parts is None else [x[:, columns] for columns in f.parts]


def measurable(f: Map, x: Tensor) -> Tensor:
    """What the residual is measured on, without a graph, in a dtype that has norms."""
    x = f.observed(x).detach()
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _scaled_figures(x: Tensor, fx: Tensor, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual, ‖f(x)‖ and ‖f(x) − x‖ of rows that are too small or too large to be squared, by their largest entry."""
    x, fx = x.double(), fx.double()
    unit = torch.maximum(fx.abs(), x.abs()).amax(dim=1).clamp(min=torch.finfo(fx.dtype).tiny)
    finite = torch.isfinite(fx).all(dim=1)
    x, fx = x / unit.unsqueeze(1), fx / unit.unsqueeze(1)
    size, change = torch.linalg.vector_norm(fx, dim=1), torch.linalg.vector_norm(fx - x, dim=1)
    # Where f(x) is 0 and x is not, the next step may well end: only what is not finite is lost.
    residual = torch.where(change == 0, 0.0, change / (size + floor / unit)).clamp(max=torch.finfo(torch.float32).max)
    return on_host(torch.where(finite, residual, torch.inf)), on_host(size * unit), on_host(change * unit)
