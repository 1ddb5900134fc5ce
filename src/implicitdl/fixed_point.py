"""The public door: solve x = f(x, *args) or g(x, *args) = 0, differentiate through the solution, report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._internal.context import outside_graphs, plain, without_grad
from ._internal.errors import DIVERGED, finite, wrong
from ._internal.habits import unknown_keywords
from .adjoints import Adjoint, ImplicitAdjoint, transforms
from .equations.equilibrium import Equilibrium
from .equations.function import FunctionMap, OneRow, State, function_map
from .equations.map import Map
from .loop.announce import announce_miss
from .loop.coupling import announce_coupling, are_coupled
from .loop.iterate import SolveResult
from .solution import BackwardReport, OnFailure, Solution, check_on_failure, monitored
from .solvers import Auto, Newton, Solver


def fixed_point(
    f: Callable[..., State],
    x0: State | None = None,
    *args: Tensor,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    coupled: bool | None = None,
    **unknown: Any,
) -> Solution:
    """Solve x = f(x, \\*args), every sample to its own tolerance, with a gradient through the solution.

    Whatever f closes over gets its gradient; data goes through ``args``, whose first dimension is the batch, so that
    finished samples can leave it.  With data in a closure they are only frozen.

    Where f is an `Equilibrium`, torch.func's transforms and those of one another go through the solve, and so do the
    dual numbers of ``torch.autograd.forward_ad``: vmap over b adds rows, vmap over weights solves each model in turn.
    A function is refused there.  A transform sees the arguments of what it is applied to, and not what they are
    computed with inside; the derivative with respect to a weight in a closure would be lost without a word.

    ``torch.compile`` ends a graph at the solve and begins the next one behind it.  Put it around the model, and a
    gradient of torch.func around neither: a graph cannot end inside one.

    Arguments:
        f: maps a state, and args, to a state of the same shape.  Where f draws noise, or moves running statistics, a
            solve draws and moves them once (`Frozen`).
        x0: where to start, (batch, \\*state), or a tuple of such.  The solution's gradient does not depend on it.
            None starts an `Equilibrium` at f(0).
        args: tensors (batch, ...) that go with the samples.
        solver: how to solve; `Auto()` by default.
        adjoint: how to differentiate; the exact `ImplicitAdjoint()` by default.
        on_failure: what a sample that misses the tolerance causes, forward and backward: "raise" `ConvergenceError`,
            "warn" `ImplicitFunctionWarning`, or "ignore".
        trace: keep the residual of every evaluation; inside a transform, filled up with NaN to ``max_steps`` rows.
        coupled: whether samples influence one another through f, as the nodes of a graph do, or the samples of a batch
            that is normalised by its own statistics.  The batch of a coupled f is solved as one, and its figures are
            those of every sample.  None looks: for batch norm in training before the solve, and after it for samples
            whose residual is not the one they were solved to, now that the others have moved, forward and backward,
            at one evaluation (two of `root`) and one product with Jᵀ.  Such a batch is solved again as one, with as
            many steps, and `CoupledRowsWarning` says so.  True solves as one at once, and args need not be batch-first.
            False is your promise that f maps each sample on its own: nothing is looked at.

    Returns:
        The `Solution`: value, residual, steps and converged per sample, and the report of the backward solve,
        which stays empty inside a transform.

    Raises:
        ArgumentError: x0 empty or not floating point, args not batch-first, f of another shape; under a transform, an
            f that is not an `Equilibrium`, an activation that closes over a tensor of the transform's, an adjoint
            other than `ImplicitAdjoint`.
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
    if unknown:
        raise unknown_keywords("fixed_point", unknown)
    if torch.compiler.is_dynamo_compiling():  # how many steps a solve takes is no matter of a graph
        solution: Solution = outside_graphs(fixed_point)(
            f, x0, *args, solver=solver, adjoint=adjoint, on_failure=on_failure, trace=trace, coupled=coupled
        )
        return solution
    solver = Auto() if solver is None else solver
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    who = f"{'root' if isinstance(f, _Downhill) else 'fixed_point'}({type(solver).__name__})"
    check_settings(who, solver, adjoint, on_failure, coupled)
    known = f if isinstance(f, Map) and not args else None
    if known is not None and coupled:
        raise wrong(who, "coupled to be False or None for an Equilibrium, which maps each row on its own", "True")
    if x0 is None and isinstance(known, Equilibrium):
        b = known.b
        if b.dim() < 2 or b.numel() == 0 or not b.is_floating_point():
            raise wrong(who, "b of floating-point rows, (batch ≥ 1, n)", f"{tuple(b.shape)} of {b.dtype}")
    else:
        _check(who, x0, args, batch_first=not coupled)
    if not plain():
        x0 = known.after_zero() if x0 is None and known is not None else x0
        return transforms.solve(who, None if args else f, x0, solver, adjoint, on_failure, trace)
    rows = known.reduced() if known is not None else function_map(who, f, x0, args, coupled, isinstance(f, _Downhill))  # type: ignore[arg-type]
    report = BackwardReport()
    found = solve(who, rows, None if x0 is None else rows.rows(x0), solver, adjoint, on_failure, trace, report)
    return Solution(value=rows.state(found.x), stats=found.stats, backward=report)


def solve(
    who: str,
    f: Map,
    x0: Tensor | None,
    solver: Solver,
    adjoint: Adjoint,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    report: BackwardReport | None = None,
) -> SolveResult:
    """`fixed_point` on rows, behind the door: arguments have been checked, and no transform of torch.func is open.

    Arguments:
        who: the caller, for errors and warnings.
        f: the map that is iterated.
        x0: (batch, d) where to start; None for f(0).
        report: to be filled when backward runs.
    """
    report = BackwardReport() if report is None else report
    found = adjoint.solve(f, x0, solver, on_failure, trace, report)
    if isinstance(f, OneRow):
        found.stats = found.stats.of_each(f.samples)
    elif isinstance(f, FunctionMap) and not f.independent:
        with without_grad():
            coupled = are_coupled(f, found)
        if coupled:
            announce_coupling(who)
            alone, one = found.stats, OneRow.of(f, len(found.x))
            found = adjoint.solve(one, one.together(found.x), solver, on_failure, trace, report)
            found.x, found.stats = one.apart(found.x), found.stats.of_each(one.samples).after(alone)
    monitored("forward", found.stats)
    if not found.all_converged:
        for name, weight in f.named_weights.items():
            finite(who, name, weight, DIVERGED)
        announce_miss(who, "forward", found, solver, on_failure)
    if isinstance(f, (FunctionMap, OneRow)):
        f.commit_buffers(found.x)
    if found.x is x0:  # x0 was the solution; the user may go on to change either in place
        found.x = found.x.clone()
    return found


def root(g: Callable[..., State], x0: State | None = None, *args: Tensor, **options: Any) -> Solution:
    """Solve g(x, \\*args) = 0, with the options of `fixed_point`.

    The reported residual is ‖J⁻¹g(x)‖ relative to ‖x‖, the length of the Newton correction, J = ∂g/∂x: how far the
    root is, whatever the units of g and of x.  A sample is converged where it is within rtol; ``atol`` is in the units
    of x.  By default `Newton` solves both the equation and its adjoint, densely up to 256 numbers a sample; the
    adjoint's residual is relative to the cotangent.  Fixed-point solvers such as `Anderson` work on x − g(x), and
    depend on the scale of g.

    Example:
        >>> import torch
        >>> from implicitdl import root
        >>> a = torch.tensor([[2.0]], requires_grad=True)
        >>> x = root(lambda x, a: 0.3 * (x * x - a), torch.ones(1, 1), a).value
        >>> x.backward()
        >>> round(x.item(), 4), round(a.grad.item(), 4)  # √2 and 1 / (2√2)
        (1.4142, 0.3536)
    """
    options.setdefault("solver", Newton())
    options.setdefault("adjoint", ImplicitAdjoint(solver=Newton()))
    return fixed_point(_Downhill(g), x0, *args, **options)


class _Downhill(nn.Module):
    """−g(x, \\*args), the residual of x − g(x, \\*args); a Module, so that what g is made of is still seen."""

    def __init__(self, g: Callable[..., State]) -> None:
        super().__init__()
        self.g = g

    @property
    def __wrapped__(self) -> Callable[..., State]:
        return self.g

    def forward(self, x: State, *args: Tensor) -> State:
        gx = self.g(x, *args)
        if isinstance(x, tuple):
            return tuple(-part for part in gx)
        assert isinstance(gx, Tensor)
        return -gx


def _check(who: str, x0: State | None, args: tuple[Tensor, ...], batch_first: bool) -> None:
    parts: tuple[Any, ...] = x0 if isinstance(x0, tuple) else (x0,)
    for part in parts:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            got: object = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise wrong(who, "x0 of floating-point tensors, one or a tuple of them", got)
        if part.dim() == 0 or part.numel() == 0:
            raise wrong(who, "x0 of shape (batch ≥ 1, *state)", tuple(part.shape))
        if part.dtype != parts[0].dtype or part.shape[0] != parts[0].shape[0]:
            raise wrong(
                who, "every part of x0 to share batch size and dtype",
                [(tuple(p.shape), p.dtype) for p in parts],
            )  # fmt: skip
    for arg in args:
        if not isinstance(arg, Tensor):
            raise wrong(who, "args to be tensors", type(arg).__name__, "Let f close over what is no data.")
        if batch_first and (arg.dim() == 0 or arg.shape[0] != parts[0].shape[0]):
            raise wrong(
                who, f"args to be tensors of shape (batch={parts[0].shape[0]}, ...)", tuple(arg.shape),
                "Let f close over weights; args are for data. Pass coupled=True where the batch is one problem, such "
                "as a graph of nodes.",
            )  # fmt: skip


def check_settings(who: str, solver: Any, adjoint: Any, on_failure: Any, coupled: Any = None) -> None:
    """The settings of a solve, at the door where the user gives them."""
    if not isinstance(solver, Solver):
        raise wrong(who, "solver to be a Solver", repr(solver), "Pass an instance, such as Anderson().")
    if not isinstance(adjoint, Adjoint):
        raise wrong(who, "adjoint to be an Adjoint", repr(adjoint), "Pass an instance, such as Unrolled().")
    check_on_failure(who, on_failure)
    if not (coupled is None or isinstance(coupled, bool)):
        raise wrong(who, "coupled to be True, False or None", repr(coupled), "None looks whether samples are coupled.")
