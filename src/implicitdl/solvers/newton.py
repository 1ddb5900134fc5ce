"""Newton's method per sample: dense for small states, Newton–Krylov for large ones, semismooth at kinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from .._internal.errors import positive_int, settle, wrong
from ..equations.map import LinearMap, Map
from .base import Solver, residual, smallest_part
from .krylov import Krylov, refuse_graph
from .search import Search
from .state import Rows

# Up to here a Jacobian is formed.  Its LU costs n/3 evaluations of a dense f in operations and some times that in
# time; above a few hundred numbers the tens of products of a Krylov space are cheaper.
DENSE_UP_TO = 256
# Numbers in one Jacobian beyond which a dense solve is refused: 1 GiB in float64, and 10¹² operations a factorisation.
_LARGEST = 1 << 27
# Eisenstat and Walker's value for both constants of their choice 2: η = γ (‖r‖ / ‖r before‖)², at most η_max.
_FORCING = 0.9
# Length of the probe of a matrix-free product, in residuals.
_REACH = 0.1
# Numbers in the Jacobians factorised at once; the rest of the batch follows.
_AT_ONCE = 1 << 24


@dataclass(slots=True)
class _Jacobians(Rows):
    """The Jacobians at the points of a batch, for those of its samples that are still there."""

    of: Callable[[Tensor], Tensor]  # sample numbers to (len(rows), d, d)
    rows: Tensor

    def __call__(self, part: Tensor) -> Tensor:
        return self.of(self.rows[part])


@dataclass(slots=True)
class _Dense(Rows):
    search: Search
    jacobians: _Jacobians | None = None
    p: Tensor | None = (
        None  # (batch, d)  the Newton step at the point, of a root problem whose correction was asked for
    )


@dataclass(slots=True)
class _MatrixFree(Rows):
    krylov: Krylov
    before: Tensor  # (batch,)  ‖r‖ at the point before the search's


@dataclass(frozen=True, kw_only=True)
class Newton(Solver):
    """x ← x + t p, (I − J) p = f(x) − x, with t = 1 unless the residual would not fall.

    A state of up to 256 numbers has its J formed, diag(φ') A for an `Equilibrium` and by as many vector–Jacobian
    products as it has numbers otherwise; a larger one is solved by GMRES from evaluations of f alone (Newton–Krylov),
    to a tolerance that tightens as the residual falls.  At a kink J is a one-sided derivative, so on ReLU models
    this is the semismooth method, which ends after finitely many steps at the exact solution.

    A trial at which the residual does not fall is halved; where six halvings do not help plain steps are taken.
    Every trial is one evaluation of f, and so is every product of the matrix-free method.  ``steps`` counts these
    evaluations; a dense step costs a factorisation of (2/3)n³ operations on top, and the n products where there is no
    closed form.

    Arguments:
        dense: True forms J whatever the size, up to 2²⁷ numbers a sample; False never does, and needs no derivative
            of f; None decides by the size.
        krylov: the largest number of products in one matrix-free step; krylov + 1 states of memory.
        rtol, atol, max_steps: as for `Solver`.

    Source: Qi & Sun, A nonsmooth version of Newton's method (1993); Knoll & Keyes, Jacobian-free Newton–Krylov
    methods (2004); the inner tolerance is Eisenstat & Walker, Choosing the forcing terms in an inexact Newton method
    (1996), choice 2.

    Example:
        >>> import torch
        >>> from implicitdl import Newton, Picard, fixed_point
        >>> f = lambda x: torch.cos(x)
        >>> zero = torch.zeros(1, 1, dtype=torch.float64)
        >>> [int(fixed_point(f, zero, solver=s).steps) for s in (Picard(), Newton())]
        [60, 6]
    """

    dense: bool | None = None
    krylov: int = 30

    by_residual: ClassVar[bool] = True

    @property
    def recovers(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive_int, "krylov")
        if self.dense not in (None, True, False):
            raise wrong("Newton", "dense to be True, False or None", repr(self.dense))

    def init(self, f: Map, x: Tensor) -> _Dense | _MatrixFree:
        if self._forms_jacobian(f, x):
            return _Dense(Search.start(x))
        krylov = Krylov.start(x, self.krylov, self.max_steps)
        return _MatrixFree(krylov, torch.zeros_like(krylov.search.size))

    def evaluate(self, f: Map, x: Tensor, state: _Dense | _MatrixFree) -> Tensor:
        if isinstance(state, _MatrixFree):
            return f(x)
        value, jacobian = f.jacobian(x)
        state.jacobians = _Jacobians(jacobian, torch.arange(len(x), device=x.device))
        return value if torch.is_grad_enabled() else value.detach()

    def step(
        self, f: Map, x: Tensor, fx: Tensor, state: _Dense | _MatrixFree
    ) -> tuple[Tensor, _Dense | _MatrixFree, int]:
        r = residual(f, x, fx)
        if isinstance(state, _Dense):
            return self._dense_step(f, x, r, state).to(fx.dtype), state, 0
        refuse_graph("Newton", fx)
        size = smallest_part(f, fx).to(r.dtype)
        return self._matrix_free_step(f, x, r, size, state).to(fx.dtype), state, 0

    def correction(self, f: Map, x: Tensor, fx: Tensor, state: _Dense | _MatrixFree) -> Tensor | None:
        r = residual(f, x, fx.detach())
        if isinstance(state, _MatrixFree):
            if isinstance(f, LinearMap):
                return None
            # The step that led here, solved for as far as its forcing asks, is longer than the next one.
            krylov = state.krylov
            nearer = krylov.tried & (torch.linalg.vector_norm(r, dim=1) <= 0.5 * krylov.search.size)
            # A size of 0 is one that the dtype cannot square, and no step was found from it.
            known = nearer & (krylov.search.size > 0) & (krylov.search.size < torch.inf)
            return torch.where(known.unsqueeze(1), x - krylov.search.x, torch.inf)
        assert state.jacobians is not None, "evaluated by this method"
        size = torch.linalg.vector_norm(r, dim=1)
        wanted = torch.isfinite(size) & ((size <= state.search.size) | (state.search.plain > 0))
        state.p = r.new_full(r.shape, torch.inf)
        rows = wanted.nonzero().squeeze(1)
        rounding, lost = torch.zeros_like(size), torch.ones_like(wanted)
        for part in rows.split(max(1, _AT_ONCE // x.shape[1] ** 2)) if rows.numel() else ():
            J = state.jacobians(part).to(r.dtype).detach()
            p, known = _root_step(J, r[part])
            state.p = state.p.index_put((part,), p)
            lost = lost.index_put((part,), ~known)
            # A residual of this size belongs to a J that differs from J by its rounding.
            length = torch.linalg.vector_norm(x[part], dim=1).to(r.dtype)
            rounding[part] = 4 * torch.finfo(r.dtype).eps * torch.linalg.matrix_norm(J) * length
        # Where J is singular the step is one to take, and says nothing of how far the root is.
        return rounding if isinstance(f, LinearMap) else torch.where(lost.unsqueeze(1), torch.inf, state.p)

    def _dense_step(self, f: Map, x: Tensor, r: Tensor, state: _Dense) -> Tensor:
        search, root = state.search, f.root
        good, _ = search.judge(x, r, root=root)
        rows = good.nonzero().squeeze(1)
        if rows.numel():
            assert state.jacobians is not None
            # A Jacobian at a time of as many samples as memory likes; the others' points have not moved.
            parts = rows.split(max(1, _AT_ONCE // x.shape[1] ** 2))
            if state.p is not None:
                p = state.p[rows]
            else:
                step = (lambda J, r: _root_step(J, r)[0]) if root else _solve
                p = torch.cat([step(state.jacobians(part).to(r.dtype), search.r[part]) for part in parts])
            search.p = search.p.index_put((rows,), p)
        state.p = None
        return search.trial()

    def _matrix_free_step(self, f: Map, x: Tensor, r: Tensor, scale: Tensor, state: _MatrixFree) -> Tensor:
        root, linear = f.root, isinstance(f, LinearMap)
        krylov, search = state.krylov, state.krylov.search
        tried = krylov.tried
        krylov.extend(r)
        good, _ = search.judge(x, r, tried, root=root)
        # Far from the solution a Newton step is not worth solving for, near it half of the tolerance is enough.
        forcing = (_FORCING * (search.size / state.before) ** 2).clamp(max=_FORCING)
        end = 0.5 * (self.atol + self.tolerance(r.dtype) * scale)
        enough = torch.maximum(forcing * search.size, end)
        h = _REACH * search.size
        if root:
            # The residual has other units than x: neither a length to probe with, nor known to be small.
            tolerance = self.tolerance(r.dtype)
            enough = (0.5 * tolerance if linear else forcing.clamp(min=1e-3, max=0.1)) * search.size
            length = torch.linalg.vector_norm(search.x, dim=1)
            length = torch.where(length > 0, length, 1.0)
            h = length if linear else torch.finfo(r.dtype).eps ** 0.5 * length
        state.before = torch.where(good, search.size, state.before)
        # A difference over h errs by curvature × h, Newton's own step by curvature × ‖p‖: a probe shorter than the
        # residual adds nothing to the error, and the longer it is the less rounding counts.
        krylov.begin(good, h=h, enough=enough)
        return krylov.point()

    def _forms_jacobian(self, f: Map, x: Tensor) -> bool:
        d = x.shape[1]
        differentiable = f.closed_form or not torch.is_inference_mode_enabled()
        if not self.dense:
            return self.dense is None and d <= DENSE_UP_TO and differentiable
        if d * d > _LARGEST:
            raise wrong(
                "Newton", f"a state of at most {isqrt(_LARGEST)} numbers for a dense Jacobian",
                f"{d}, whose Jacobian takes {d * d * x.element_size():.1e} bytes a sample",
                "Leave dense=None, which solves large states without forming it.",
            )  # fmt: skip
        if not differentiable:
            raise wrong(
                "Newton", "autograd for the Jacobian of a function", "torch.inference_mode()",
                "Use torch.no_grad(), or dense=False, which needs no derivative.",
            )  # fmt: skip
        return True


def newton_correction(f: Map, x: Tensor) -> Tensor:
    """The Newton step of a root problem at x, by one evaluation and its Jacobian; inf where this is singular."""
    value, jacobian = f.jacobian(x)
    p, known = _root_step(jacobian(torch.arange(len(x), device=x.device)).detach(), value.detach())
    return torch.where(known.unsqueeze(1), p, torch.inf)


def _solve(J: Tensor, r: Tensor) -> Tensor:
    """(I − J) p = r, and the plain step p = r where I − J is singular."""
    p, known = _solved(torch.eye(J.shape[1], dtype=J.dtype, device=J.device) - J, r)
    return torch.where(known.unsqueeze(1), p, r)


def _root_step(J: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """−J p = r, and whether J has an inverse; where not, Levenberg's step, of a damping that rounding asks for."""
    p, known = _solved(-J, r)
    if bool(known.all()):
        return p, known
    largest = J.abs().amax(dim=(1, 2)).clamp(min=torch.finfo(J.dtype).tiny)
    N = -J / largest.view(-1, 1, 1)
    damping = J.shape[1] * torch.finfo(J.dtype).eps ** 0.5 * torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
    damped, found = _solved(N.transpose(1, 2) @ N + damping, (N.transpose(1, 2) @ r.unsqueeze(2)).squeeze(2))
    damped = torch.where(found.unsqueeze(1), damped / largest.unsqueeze(1), r)
    return torch.where(known.unsqueeze(1), p, damped), known


def _solved(M: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """M⁻¹r, and where it exists."""
    p, failed = torch.linalg.solve_ex(M, r.unsqueeze(2))
    return p.squeeze(2), (failed == 0) & torch.isfinite(p.squeeze(2)).all(dim=1)
