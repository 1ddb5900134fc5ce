"""The public door: solve x = f(x, *args) or g(x, *args) = 0, differentiate through the solution, report."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._checks import wrong
from .adjoints import Adjoint, ImplicitAdjoint
from .equilibrium import Equilibrium
from .solution import BackwardReport, OnFailure, Solution, announce, check_on_failure
from .solvers import Auto, Solver

State: TypeAlias = Tensor | tuple[Tensor, ...]


def fixed_point(
    f: Callable[..., State],
    x0: State,
    *args: Tensor,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
) -> Solution:
    """Solve x = f(x, \\*args), every sample to its own tolerance, with a gradient through the solution.

    Whatever f closes over gets its gradient; data goes through ``args``, whose first dimension is the batch, so that
    finished samples can leave it.  With data in a closure they are only frozen.

    Arguments:
        f: maps a state, and args, to a state of the same shape.  Each sample must be mapped on its own (batch norm
            in training is the known exception: its samples are coupled, and so are their answers).
        x0: where to start, (batch, \\*state), or a tuple of such.  The solution's gradient does not depend on it.
        args: tensors (batch, ...) that go with the samples.
        solver: how to solve; `Auto()` by default.
        adjoint: how to differentiate; the exact `ImplicitAdjoint()` by default.
        on_failure: what a sample that misses the tolerance causes, forward and backward: "raise" `ConvergenceError`,
            "warn" `ImplicitFunctionWarning`, or "ignore".
        trace: keep the residual of every evaluation.

    Returns:
        The `Solution`: value, residual, steps and converged per sample, and the report of the backward solve.

    Raises:
        ArgumentError: x0 empty or not floating point, args not batch-first, f of another shape.
        ConvergenceError: under ``on_failure="raise"``.

    Example:
        >>> import torch
        >>> from implicitdl import fixed_point
        >>> u = torch.tensor([[1.0], [2.0]], requires_grad=True)
        >>> solution = fixed_point(lambda x, u: torch.tanh(0.5 * x + u), torch.zeros(2, 1), u)
        >>> solution.converged
        tensor([True, True])
        >>> solution.value.sum().backward()
        >>> u.grad.shape
        torch.Size([2, 1])
    """
    solver = Auto() if solver is None else solver
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    who = f"fixed_point({type(solver).__name__})"
    _check(who, solver, adjoint, on_failure, x0, args)
    problem = f.problem() if isinstance(f, Equilibrium) and not args else _RowsOf(who, f, x0, args)
    start = problem.enter(x0)
    report = BackwardReport()
    rows, outcome = adjoint.solve(problem, start, solver, on_failure, trace, report)
    announce(
        who, "forward", outcome.residual, outcome.steps, outcome.converged, outcome.all_converged, outcome.rtol,
        solver.max_steps, on_failure,
    )  # fmt: skip
    if rows is start:  # x0 was the solution; the user may go on to change either in place
        rows = rows.clone()
    return Solution(problem.leave(rows), outcome.residual, outcome.steps, outcome.converged, outcome.trace, report)


def root(g: Callable[..., State], x0: State, *args: Tensor, **options: Any) -> Solution:
    """Solve g(x, \\*args) = 0, as the fixed point of x − g(x, \\*args), with the options of `fixed_point`.

    The reported residual is ‖g(x)‖ relative to ‖x − g(x)‖.

    Example:
        >>> import torch
        >>> from implicitdl import root
        >>> a = torch.tensor([[2.0]], requires_grad=True)
        >>> x = root(lambda x, a: 0.3 * (x * x - a), torch.ones(1, 1), a).value
        >>> x.backward()
        >>> round(x.item(), 4), round(a.grad.item(), 4)  # √2 and 1 / (2√2)
        (1.4142, 0.3536)
    """

    def f(x: State, *args: Tensor) -> State:
        gx = g(x, *args)
        if isinstance(x, tuple):
            return tuple(part - step for part, step in zip(x, gx, strict=True))
        assert isinstance(gx, Tensor)
        return x - gx

    return fixed_point(f, x0, *args, **options)


class _RowsOf:
    """f on states of any shape, or on tuples of them, as a map of rows."""

    check_interval = 1  # nothing is known of f: it may cost far more than a look at the residual

    def __init__(self, who: str, f: Callable[..., State], like: State, args: tuple[Tensor, ...]) -> None:
        self._who, self._f, self._args = who, f, args
        self._tuple = isinstance(like, tuple)
        self._shapes = [part.shape[1:] for part in (like if isinstance(like, tuple) else (like,))]

    def __call__(self, x: Tensor) -> Tensor:
        fx = self._f(self.leave(x), *self._args)
        parts = fx if isinstance(fx, tuple) else (fx,)
        if [part.shape[1:] for part in parts] != self._shapes or parts[0].shape[0] != x.shape[0]:
            expected = [(x.shape[0], *shape) for shape in self._shapes]
            raise wrong(self._who, f"f to return shape {expected}", [tuple(part.shape) for part in parts])
        return self._pack(parts)

    def take(self, rows: Tensor) -> _RowsOf | None:
        if not self._args:
            return None
        like = tuple(rows.new_empty((0, *shape)) for shape in self._shapes)
        args = tuple(arg[rows] for arg in self._args)
        return _RowsOf(self._who, self._f, like if self._tuple else like[0], args)

    def enter(self, x: State) -> Tensor:
        return self._pack(x if isinstance(x, tuple) else (x,))

    def leave(self, rows: Tensor) -> State:
        if not self._tuple:
            return rows.view(-1, *self._shapes[0])
        sizes = [prod(shape) for shape in self._shapes]
        return tuple(part.reshape(-1, *shape) for part, shape in zip(rows.split(sizes, 1), self._shapes, strict=True))

    @staticmethod
    def _pack(parts: tuple[Tensor, ...]) -> Tensor:
        flat = [part.reshape(part.shape[0], -1) for part in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def _check(who: str, solver: Solver, adjoint: Adjoint, on_failure: str, x0: State, args: tuple[Tensor, ...]) -> None:
    if not isinstance(solver, Solver):
        raise wrong(who, "solver to be a Solver", repr(solver), "Pass an instance, such as Anderson().")
    if not isinstance(adjoint, Adjoint):
        raise wrong(who, "adjoint to be an Adjoint", repr(adjoint), "Pass an instance, such as Unrolled().")
    check_on_failure(who, on_failure)
    parts = x0 if isinstance(x0, tuple) else (x0,)
    for part in parts:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            got: object = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise wrong(who, "x0 of floating-point tensors", got)
        if part.dim() == 0 or part.numel() == 0:
            raise wrong(who, "x0 of shape (batch ≥ 1, *state)", tuple(part.shape))
        if part.dtype != parts[0].dtype or part.shape[0] != parts[0].shape[0]:
            raise wrong(
                who, "every part of x0 to share batch size and dtype",
                [(tuple(p.shape), p.dtype) for p in parts],
            )  # fmt: skip
    for arg in args:
        if not isinstance(arg, Tensor) or arg.dim() == 0 or arg.shape[0] != parts[0].shape[0]:
            got = tuple(arg.shape) if isinstance(arg, Tensor) else type(arg).__name__
            raise wrong(
                who, f"args to be tensors of shape (batch={parts[0].shape[0]}, ...)", got,
                "Let f close over weights; args are for data.",
            )  # fmt: skip
