"""Problems with known answers, and what every solver, adjoint and constraint must do on them.

For tests of your own solver, adjoint or constraint: call `check_solver`, `check_adjoint` or `check_constraint` with
an instance.  The library's own are listed at the end, one line each, and its whole suite runs over those lists.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..activations import RELU
from ..adjoints import Adjoint, ImplicitAdjoint, PhantomGradient, Unrolled
from ..constraints import (
    Constraint,
    LowRank,
    Monotone,
    RowProjection,
    RowScaling,
    SoftRowScaling,
    SpectralNorm,
    StrictlyUpper,
    Unconstrained,
    WeightedRowScaling,
)
from ..equations.equilibrium import Equilibrium
from ..fixed_point import fixed_point
from ..solution import ImplicitFunctionWarning, Solution
from ..solvers import (
    GMRES,
    Aitken,
    Anderson,
    Auto,
    Broyden,
    ForwardBackward,
    Momentum,
    Newton,
    PeacemanRachford,
    Picard,
    Solver,
)
from .problems import Problem

F64 = torch.float64


def check_solver(solver: Solver, problem: Problem) -> None:
    """The answer, the residual of the returned value, and the same answer and about the same steps alone.

    Raises:
        AssertionError: naming the sample and the figure that is wrong.
    """
    solution = _quietly(lambda: problem.solve(solver))
    value = solution.value
    assert isinstance(value, Tensor)
    assert torch.isfinite(value).all(), f"{problem.name}: a sample came back without its last finite iterate"
    missed = problem.solvable & ~solution.converged
    assert not missed.any(), f"{problem.name}: samples {missed.nonzero().flatten().tolist()} were not solved"
    assert not (solution.converged & ~problem.solvable).any(), f"{problem.name}: claims what has no solution"

    rtol = solver.tolerance(value.dtype)
    assert (solution.residual[solution.converged] <= rtol).all(), f"{problem.name}: residual above rtol"
    fx = problem.f(value, *problem.args)
    size = fx.flatten(1).norm(dim=1).clamp(min=torch.finfo(F64).tiny)
    measured = (fx - value).flatten(1).norm(dim=1) / size
    same = torch.isclose(solution.residual, measured, rtol=1e-6, atol=1e-13) | ~torch.isfinite(measured)
    assert same.all(), f"{problem.name}: residual is not that of the returned value"

    bound = problem.conditioning * rtol * problem.exact.flatten(1).norm(dim=1)
    error = (value - problem.exact).flatten(1).norm(dim=1)
    assert (error <= bound)[problem.solvable].all(), f"{problem.name}: error {float(error[problem.solvable].max()):.1e}"

    # What else is in the batch changes a sample by the rounding of f, with which the path of a quasi-Newton method may
    # end some steps later (395 against 499 on a Jordan block); the steps of a batch-mate are many times its own.
    for i in problem.solvable.nonzero().flatten().tolist():
        one = problem.sample(i)
        alone = _quietly(lambda one=one: one.solve(solver))  # type: ignore[misc]
        assert alone.converged.all(), f"{problem.name}: sample {i} is not solved alone"
        fewer, more = sorted((int(alone.steps), int(solution.steps[i])))
        assert more <= 1.5 * fewer + 1, f"{problem.name}: steps depend on the batch, {fewer} and {more}"
        error_alone = (alone.value - problem.exact[i : i + 1]).norm()  # type: ignore[operator]
        assert error_alone <= bound[i], f"{problem.name}: sample {i} depends on its batch-mates"


def check_adjoint(adjoint: Adjoint, solver: Solver) -> None:
    """Gradients of a closure, of an argument and of an Equilibrium against finite differences, by the adjoint's claim.

    Raises:
        AssertionError, or gradcheck's own error.
    """
    for order, f, inputs in _differentiable(adjoint, solver):
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        if order == 2:
            assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def _differentiable(adjoint: Adjoint, solver: Solver) -> list[tuple[int, Callable[..., Tensor], tuple[Tensor, ...]]]:
    g = torch.Generator().manual_seed(1)
    A = (0.3 * torch.randn(3, 3, generator=g, dtype=F64)).requires_grad_()
    b = torch.randn(2, 3, generator=g, dtype=F64).requires_grad_()
    zero = torch.zeros(2, 3, dtype=F64)
    options: dict[str, Any] = {"solver": solver, "adjoint": adjoint, "on_failure": "raise"}
    order = getattr(adjoint, "order", 1)

    def closure(A: Tensor, b: Tensor) -> Tensor:
        return fixed_point(lambda x: torch.tanh(x @ A.t() + b), zero, **options).value  # type: ignore[return-value]

    def argument(A: Tensor, b: Tensor) -> Tensor:
        return fixed_point(lambda x, b: torch.tanh(x @ A.t() + b), zero, b, **options).value  # type: ignore[return-value]

    def equilibrium(A: Tensor, b: Tensor) -> Tensor:
        return fixed_point(Equilibrium(A, b, RELU), zero, **options).value  # type: ignore[return-value]

    return [(order, f, (A, b)) for f in (closure, argument, equilibrium)]


def check_constraint(constraint: Constraint, raw: tuple[Tensor, ...]) -> None:
    """Membership, the round trip, gradients away from kinks, and membership after steps of SGD.

    Arguments:
        constraint: the object to check.
        raw: its free parameters, float64, away from its kinks.
    """
    A = constraint(*raw)
    assert constraint.contains(A)
    back = constraint.right_inverse(A)
    assert torch.allclose(constraint(*(back if isinstance(back, tuple) else (back,))), A, rtol=1e-9, atol=1e-12)
    free = tuple(part.clone().requires_grad_() for part in raw)
    assert torch.autograd.gradcheck(constraint, free, fast_mode=True)
    assert torch.autograd.gradgradcheck(constraint, free, fast_mode=True)
    optimiser = torch.optim.SGD(free, lr=1.0)
    weights = torch.randn(A.shape, generator=torch.Generator().manual_seed(2), dtype=A.dtype)
    for _ in range(5):
        optimiser.zero_grad()
        (constraint(*free) * weights).sum().backward()
        optimiser.step()
        assert constraint.contains(constraint(*free).detach())


def _quietly(call: Callable[[], Solution]) -> Solution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitFunctionWarning)
        return call()


SOLVERS: list[Solver] = [
    Picard(max_steps=5000),
    Picard(max_steps=5000, damping=0.7),
    Aitken(max_steps=5000),
    Anderson(),
    Anderson(damping=0.8),
    Auto(),
    Auto(slow=Broyden()),
    Broyden(),
    Broyden(memory=5, line_search=False),
    Newton(),
    Newton(dense=False),
    GMRES(),
    Momentum(max_steps=5000, damping=0.5),
]
# What also solves maps that expand, and what solves monotone models, whatever the size of A.
EXPANDING_SOLVERS: list[Solver] = [
    Broyden(memory=40, max_steps=2000),
    Newton(),
    Newton(dense=False),
    GMRES(),
]
MONOTONE_SOLVERS: list[Solver] = [
    PeacemanRachford(),
    PeacemanRachford(alpha=1.0, sweeps=1, max_steps=500),
    ForwardBackward(max_steps=5000),
    Newton(),
    Newton(dense=False),
    Broyden(),
]
EXACT_ADJOINTS: list[Adjoint] = [
    ImplicitAdjoint(),
    ImplicitAdjoint(order=2),
    ImplicitAdjoint(order=2, solver=Anderson()),
    Unrolled(),
    Unrolled(checkpoint=True),
]
APPROXIMATE_ADJOINTS: list[Adjoint] = [PhantomGradient(), PhantomGradient(steps=5, damping=0.9)]
CONSTRAINTS: list[Constraint] = [
    Unconstrained(),
    RowScaling(kappa=0.9),
    RowScaling(kappa=0.9, lipschitz=1.1),
    RowProjection(kappa=0.9),
    SoftRowScaling(kappa=0.9),
    StrictlyUpper(),
    LowRank(kappa=0.9, rank=2),
    Monotone(m=0.1),
    SpectralNorm(kappa=0.9),
    WeightedRowScaling(kappa=0.9, weights=torch.linspace(1.0, 3.0, 6, dtype=F64)),
]
