"""A state of several tensors: every part meets the tolerance by itself, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from implicitdl import Anderson, Auto, Broyden, ImplicitAdjoint, Newton, Picard, fixed_point
from precision import digits

SOLVERS = [Auto(), Anderson(), Picard(max_steps=5000), Broyden(), Newton()]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_small_part_is_not_hidden_by_a_large_one(solver):
    def f(s):
        return 0.5 * s[0] + 5e5, 0.99 * s[1] + 1e-5

    x, y = fixed_point(f, (torch.zeros(1, 3), torch.zeros(1, 2)), solver=solver, on_failure="raise").value
    assert torch.allclose(x, torch.full((1, 3), 1e6))
    assert torch.allclose(y, torch.full((1, 2), 1e-3), rtol=digits(1e-7, 1e-3), atol=0.0)


class Pair(NamedTuple):
    position: torch.Tensor
    speed: torch.Tensor


def test_a_named_tuple_stays_one():
    u = torch.randn(2, 3, requires_grad=True)
    zero = torch.zeros(2, 3)
    solution = fixed_point(lambda s, u: Pair(0.5 * s.position + u, 0.3 * s.speed + s.position), Pair(zero, zero), u)
    assert isinstance(solution.value, Pair)
    assert torch.allclose(solution.value.position, 2 * u, rtol=digits(1e-8, 1e-4))
    assert torch.allclose(solution.value.speed, 2 * u / 0.7, rtol=digits(1e-8, 1e-4))
    solution.value.speed.sum().backward()
    assert torch.allclose(u.grad, torch.full_like(u, 2 / 0.7), rtol=digits(1e-8, 1e-4))


@pytest.mark.parametrize("solver", [Auto(), Anderson(), Picard(max_steps=5000)], ids=repr)
def test_the_adjoint_of_a_small_part_is_not_hidden_either(solver):
    b = torch.ones(1, 1, requires_grad=True)
    c = torch.ones(1, 1, requires_grad=True)
    solution = fixed_point(
        lambda s, b, c: (0.5 * s[0] + b, 0.99 * s[1] + c), (torch.zeros(1, 1), torch.zeros(1, 1)), b, c,
        solver=solver, adjoint=ImplicitAdjoint(solver=solver),
    )  # fmt: skip
    x, y = solution.value
    (1e8 * x + 1e-4 * y).sum().backward()
    assert solution.backward.converged.all()
    assert torch.allclose(b.grad, torch.tensor([[2e8]]))
    assert torch.allclose(c.grad, torch.tensor([[1e-2]]), rtol=digits(1e-7, 1e-3))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_part_whose_solution_is_zero_holds_up_nobody(solver):
    def f(s):
        return 0.5 * torch.cos(s[0]), 0.5 * s[1] * s[0].sum(), torch.relu(s[2] - 1)

    x0 = (torch.zeros(2, 3), torch.ones(2, 1), torch.ones(2, 2))
    solution = fixed_point(f, x0, solver=solver, on_failure="raise")
    assert (solution.value[1] == 0).all()
    assert (solution.value[2] == 0).all()
    assert solution.steps.max() < 120


def test_the_residual_is_that_of_the_worst_part():
    def f(s):
        return 0.5 * s[0] + 1e6, 0.9 * s[1] + 1e-6

    solution = fixed_point(f, (torch.zeros(1, 3), torch.zeros(1, 2)), solver=Picard(max_steps=20), on_failure="ignore")
    worst = max(float((fx - x).norm() / fx.norm()) for x, fx in zip(solution.value, f(solution.value), strict=True))
    assert abs(float(solution.residual) / worst - 1) < 1e-6
