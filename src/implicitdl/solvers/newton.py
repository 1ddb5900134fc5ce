"""Newton's method per sample: dense for small states, Newton–Krylov for large ones, semismooth at kinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._internal.errors import positive_int, settle, wrong
from ..equations.linearize import vjp
from ..equations.map import RowMap
from .base import Rows, Solver, residual, smallest_part
from .krylov import Krylov, refuse_graph
from .search import Search

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
class _Local(Rows):
    """f at the points of a batch, for those of its samples that are still there."""

    at: Any  # value (batch, d) and jacobian(rows) -> (len(rows), d, d)
    rows: Tensor

    def jacobian(self, part: Tensor) -> Tensor:
        J: Tensor = self.at.jacobian(self.rows[part])
        return J


@dataclass(slots=True)
class _Dense(Rows):
    search: Search
    local: _Local | None = None
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

    def init(self, f: RowMap, x: Tensor) -> _Dense | _MatrixFree:
        if self._forms_jacobian(f, x):
            return _Dense(Search.start(x))
        krylov = Krylov.start(x, self.krylov, self.max_steps)
        return _MatrixFree(krylov, torch.zeros_like(krylov.search.size))

    def evaluate(self, f: RowMap, x: Tensor, state: _Dense | _MatrixFree) -> Tensor:
        if isinstance(state, _MatrixFree):
            return f(x)
        state.local = _local(f, x)
        value: Tensor = state.local.at.value
        return value if torch.is_grad_enabled() else value.detach()

    def step(
        self, f: RowMap, x: Tensor, fx: Tensor, state: _Dense | _MatrixFree
    ) -> tuple[Tensor, _Dense | _MatrixFree, int]:
        r = residual(f, x, fx)
        if isinstance(state, _Dense):
            return self._dense_step(f, x, r, state).to(fx.dtype), state, 0
        refuse_graph("Newton", fx)
        size = smallest_part(f, fx).to(r.dtype)
        return self._matrix_free_step(f, x, r, size, state).to(fx.dtype), state, 0

    def correction(self, f: RowMap, x: Tensor, fx: Tensor, state: _Dense | _MatrixFree) -> Tensor | None:
        r = residual(f, x, fx.detach())
        if isinstance(state, _MatrixFree):
            if getattr(f, "linear", False):
                return None
            # The step that led here, solved for as far as its forcing asks, is longer than the next one.
            krylov = state.krylov
            nearer = krylov.tried & (torch.linalg.vector_norm(r, dim=1) <= 0.5 * krylov.search.size)
            return torch.where((nearer & (krylov.search.size < torch.inf)).unsqueeze(1), x - krylov.search.x, torch.inf)
        assert state.local is not None, "evaluated by this method"
        size = torch.linalg.vector_norm(r, dim=1)
        wanted = torch.isfinite(size) & ((size <= state.search.size) | (state.search.plain > 0))
        state.p = r.new_full(r.shape, torch.inf)
        rows = wanted.nonzero().squeeze(1)
        rounding, lost = torch.zeros_like(size), torch.ones_like(wanted)
        for part in rows.split(max(1, _AT_ONCE // x.shape[1] ** 2)) if rows.numel() else ():
            J = state.local.jacobian(part).to(r.dtype).detach()
            p, known = _root_step(J, r[part])
            state.p = state.p.index_put((part,), p)
            lost = lost.index_put((part,), ~known)
            # A residual of this size belongs to a J that differs from J by its rounding.
            length = torch.linalg.vector_norm(x[part], dim=1).to(r.dtype)
            rounding[part] = 4 * torch.finfo(r.dtype).eps * torch.linalg.matrix_norm(J) * length
        # Where J is singular the step is one to take, and says nothing of how far the root is.
        return rounding if getattr(f, "linear", False) else torch.where(lost.unsqueeze(1), torch.inf, state.p)

    def _dense_step(self, f: RowMap, x: Tensor, r: Tensor, state: _Dense) -> Tensor:
        search, root = state.search, getattr(f, "root", False)
        good, _ = search.judge(x, r, root=root)
        rows = good.nonzero().squeeze(1)
        if rows.numel():
            assert state.local is not None
            # A Jacobian at a time of as many samples as memory likes; the others' points have not moved.
            parts = rows.split(max(1, _AT_ONCE // x.shape[1] ** 2))
            if state.p is not None:
                p = state.p[rows]
            else:
                step = (lambda J, r: _root_step(J, r)[0]) if root else _solve
                p = torch.cat([step(state.local.jacobian(part).to(r.dtype), search.r[part]) for part in parts])
            search.p = search.p.index_put((rows,), p)
        state.p = None
        return search.trial()

    def _matrix_free_step(self, f: RowMap, x: Tensor, r: Tensor, scale: Tensor, state: _MatrixFree) -> Tensor:
        root, linear = getattr(f, "root", False), getattr(f, "linear", False)
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

    def _forms_jacobian(self, f: RowMap, x: Tensor) -> bool:
        d = x.shape[1]
        differentiable = hasattr(f, "linearize") or not torch.is_inference_mode_enabled()
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


def _local(f: RowMap, x: Tensor) -> _Local:
    """f at x by one evaluation, in closed form where f offers it."""
    closed_form = getattr(f, "linearize", None)
    if getattr(f, "linear", False):
        at: Any = _OfLinear(f, x)
    elif closed_form is None:
        at = _Differentiated(f, x)
    else:
        at = closed_form(x)
        at = at if hasattr(at, "jacobian") else _ByProducts(at.value, at.vjp)
    return _Local(at, torch.arange(len(x), device=x.device))


class _OfLinear:
    """A linear map at a point: its matrix has a product for every column."""

    def __init__(self, f: Any, x: Tensor) -> None:
        self._f, self.value = f, f(x)
        self._J: Tensor | None = None

    def jacobian(self, rows: Tensor) -> Tensor:
        if self._J is None:
            unit = torch.eye(self.value.shape[1], dtype=self.value.dtype, device=self.value.device)
            columns = [self._f.product(row.expand_as(self.value).contiguous()) for row in unit]
            self._J = torch.stack(columns, dim=2).detach()
        return self._J[rows]


class _ByProducts:
    """J of all samples from one product a row: eᵢᵀJ of every sample at once."""

    def __init__(self, value: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        self.value, self._product = value, product
        self._J: Tensor | None = None

    def jacobian(self, rows: Tensor) -> Tensor:
        if self._J is None:
            unit = torch.eye(self.value.shape[1], dtype=self.value.dtype, device=self.value.device)
            self._J = torch.stack([self._product(row.expand_as(self.value)) for row in unit], dim=1).detach()
        return self._J[rows]


class _Differentiated(_ByProducts):
    """f at x with the graph of its one evaluation."""

    def __init__(self, f: RowMap, x: Tensor) -> None:
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            value = f(point)
        if not value.requires_grad:
            raise wrong(
                "Newton", "f differentiable by autograd", "a value without a graph",
                "Remove what detaches it, or pass dense=False, which needs no derivative.",
            )  # fmt: skip
        super().__init__(value, lambda v: vjp(value, point, v, create_graph=False))


def newton_correction(f: RowMap, x: Tensor) -> Tensor:
    """The Newton step of a root problem at x, by one evaluation and its Jacobian; inf where this is singular."""
    local = _local(f, x)
    p, known = _root_step(local.jacobian(local.rows).detach(), local.at.value.detach())
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
