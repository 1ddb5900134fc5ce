"""Problems with known answers, and what every solver, adjoint and constraint must do on them.

For tests of your own solver, adjoint or constraint: call `check_solver`, `check_adjoint` or `check_constraint` with
an instance.  The library's own are listed at the end, one line each, and its whole suite runs over those lists.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .activations import RELU
from .adjoints import Adjoint, ImplicitAdjoint, PhantomGradient, Unrolled
from .constraints import (
    Constraint,
    LowRank,
    RowProjection,
    RowScaling,
    SoftRowScaling,
    StrictlyUpper,
    Unconstrained,
)
from .equilibrium import Equilibrium
from .fixed_point import fixed_point
from .solution import ImplicitFunctionWarning, Solution
from .solvers import Aitken, Anderson, Auto, Picard, Solver

F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """x = f(x, *args) with its exact answer.

    Attributes:
        exact: (batch, *state) the solution; NaN for samples that have none.
        solvable: (batch,) which samples have one that every solver must find.
        conditioning: bound on the error of a sample, in units of its relative residual times ‖x*‖.
    """

    name: str
    f: Callable[..., Tensor]
    x0: Tensor
    args: tuple[Tensor, ...]
    exact: Tensor
    solvable: Tensor
    conditioning: float

    def solve(self, solver: Solver, **options: Any) -> Solution:
        return fixed_point(self.f, self.x0, *self.args, solver=solver, **options)

    def sample(self, i: int) -> Problem:
        """One of its samples, alone."""
        one = slice(i, i + 1)
        args = tuple(arg[one] for arg in self.args)
        return Problem(self.name, self.f, self.x0[one], args, self.exact[one], self.solvable[one], self.conditioning)


def problems() -> list[Problem]:
    """The zoo: contractive, slow, non-normal, rotation, mixed difficulty, divergent, NaN in one sample, zero."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    def affine(name: str, A: Tensor, batch: int = 4) -> Problem:
        exact = normal(batch, A.shape[0])
        # ‖x − x*‖ ≤ ‖(I − A)⁻¹‖ ‖f(x) − x‖, and twice that for ‖f(x)‖ in place of ‖x*‖.
        condition = 2 * float(torch.linalg.matrix_norm(torch.linalg.inv(torch.eye(len(A), dtype=F64) - A), 2))
        return Problem(
            name, lambda x, b: x @ A.t() + b, torch.zeros_like(exact), (exact - exact @ A.t(),), exact,
            torch.ones(batch, dtype=torch.bool), condition,
        )  # fmt: skip

    n = 12
    W = 0.4 * normal(n, n) / n**0.5
    inside = torch.tanh(normal(5, n))
    contractive = Problem(
        "contractive", lambda x, b: torch.tanh(x @ W.t() + b), torch.zeros(5, n, dtype=F64),
        (torch.atanh(inside) - inside @ W.t(),), inside, torch.ones(5, dtype=torch.bool), 20.0,
    )  # fmt: skip

    positive = torch.rand(n, n, generator=g, dtype=F64)
    slow = affine("slow", 0.99 * positive / positive.sum(dim=1, keepdim=True))
    non_normal = affine("non-normal", 0.5 * torch.eye(6, dtype=F64) + torch.diag(torch.full((5,), 3.0, dtype=F64), 1))
    turn = 0.95 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    rotation = affine("rotation", torch.block_diag(turn, turn @ turn, 0.5 * turn))

    rates = torch.tensor([[0.0], [0.5], [0.9], [0.98]], dtype=F64)
    target = normal(4, 3)
    mixed = Problem(
        "mixed", lambda x, c, t: c * x + (1 - c) * t, torch.zeros(4, 3, dtype=F64), (rates.expand(4, 3), target),
        target, torch.ones(4, dtype=torch.bool), 100.0,
    )  # fmt: skip

    divergent = Problem(
        "divergent", lambda x: x * x + 1, torch.ones(3, 1, dtype=F64), (), torch.full((3, 1), torch.nan, dtype=F64),
        torch.zeros(3, dtype=torch.bool), torch.inf,
    )  # fmt: skip

    poisoned = normal(3, 2)
    poisoned[1] = torch.nan
    nan_sample = Problem(
        "nan-sample", lambda x, b: 0.5 * x + b, torch.zeros(3, 2, dtype=F64), (poisoned,), 2 * poisoned,
        torch.tensor([True, False, True]), 4.0,
    )  # fmt: skip

    zero = Problem(
        "zero", lambda x: 0 * x, torch.zeros(2, 4, dtype=F64), (), torch.zeros(2, 4, dtype=F64),
        torch.ones(2, dtype=torch.bool), 1.0,
    )  # fmt: skip
    return [contractive, slow, non_normal, rotation, mixed, divergent, nan_sample, zero]


def check_solver(solver: Solver, problem: Problem) -> None:
    """The answer, the residual of the returned value, and independence of the batch.

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

    error = (value - problem.exact).flatten(1).norm(dim=1)[problem.solvable]
    bound = problem.conditioning * rtol * problem.exact.flatten(1).norm(dim=1)[problem.solvable]
    assert (error <= bound).all(), f"{problem.name}: error {float(error.max()):.1e}"

    for i in range(len(value)):
        one = problem.sample(i)
        alone = _quietly(lambda one=one: one.solve(solver))  # type: ignore[misc]
        assert int(alone.steps) == int(solution.steps[i]), f"{problem.name}: steps depend on the batch"
        assert torch.allclose(alone.value[0], value[i], rtol=1e-9, atol=1e-12), (
            f"{problem.name}: sample {i} depends on its batch-mates"
        )


def check_adjoint(adjoint: Adjoint, solver: Solver) -> None:
    """Gradients of a closure, of an argument and of an Equilibrium against finite differences, by the adjoint's claim.

    Raises:
        AssertionError, or gradcheck's own error.
    """
    for order, f, inputs in _differentiable(adjoint, solver):
        assert torch.autograd.gradcheck(f, inputs)
        if order == 2:
            assert torch.autograd.gradgradcheck(f, inputs)


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
    assert torch.autograd.gradcheck(constraint, free)
    assert torch.autograd.gradgradcheck(constraint, free)
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
]
EXACT_ADJOINTS: list[Adjoint] = [
    ImplicitAdjoint(),
    ImplicitAdjoint(order=2),
    ImplicitAdjoint(order=2, solver=Anderson()),
    Unrolled(),
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
]
