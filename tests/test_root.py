"""g(x) = 0 by `root`: free of the units of g and of x, right with its gradient, or an honest miss."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import jacobian

from implicitdl import GMRES, Anderson, Auto, Broyden, ImplicitAdjoint, Newton, Picard, fixed_point, root
from precision import digits
from root_problems import PROBLEMS

# At a root where the Jacobian is singular a gradient does not exist.
REGULAR = sorted(set(PROBLEMS) - {"Powell singular", "extended Powell singular", "arctangent", "Powell badly scaled"})


@pytest.mark.parametrize("name", REGULAR)
def test_a_root_is_found_with_its_gradient(name):
    g, x0 = PROBLEMS[name]
    a = torch.zeros_like(x0, requires_grad=True)
    solution = root(lambda x, a: g(x) - a, x0, a, on_failure="raise")
    x = solution.value
    J = jacobian(lambda x: g(x[None])[0], x.detach()[0])
    weights = torch.linspace(1.0, 2.0, x.shape[1], dtype=x.dtype)[None]
    (gradient,) = torch.autograd.grad((weights * x).sum(), a)
    exact = torch.linalg.solve(J.t(), weights[0])
    assert (gradient[0] - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("name", ["Powell singular", "extended Powell singular"])
def test_a_singular_root_at_zero_is_found(name):
    g, x0 = PROBLEMS[name]
    solution = root(g, x0, on_failure="raise")
    assert (g(solution.value.detach()) == 0).all()


@pytest.mark.parametrize(("dtype", "c"), [
    *((torch.float64, 10.0**k) for k in (-12, 12)), *((torch.float32, 10.0**k) for k in (-8, 8)),
], ids=str)  # fmt: skip
def test_claims_do_not_depend_on_the_units_of_g(dtype, c):
    a = torch.tensor([[2.0, 3.0], [0.5, 5.0], [-1.0, 2.0]], dtype=dtype)  # −1 has no root

    def solve(c):
        x0 = torch.ones_like(a)
        solution = root(lambda x, a: c * (x * x - a), x0, a.clone().requires_grad_(), on_failure="ignore")
        return solution

    scaled, one = solve(c), solve(1.0)
    assert torch.equal(scaled.converged, one.converged)
    assert one.converged.tolist() == [True, True, False]
    assert torch.allclose(scaled.value[:2], one.value[:2], rtol=10 * Newton().tolerance(dtype))
    assert torch.allclose(one.value[:2], a[:2].sqrt(), rtol=10 * Newton().tolerance(dtype))


@pytest.mark.parametrize("unit", [1e-20, 1e20])
def test_claims_do_not_depend_on_the_units_of_x(unit):
    x0 = torch.full((1, 2), 3.0) * unit
    solution = root(lambda x: (x / unit) ** 2 - 2, x0, on_failure="raise")
    assert torch.allclose(solution.value / unit, torch.full((1, 2), 2.0).sqrt())


@pytest.mark.parametrize("solver", [Newton(), Broyden()], ids=repr)
def test_a_trial_outside_of_the_domain_is_halved(solver):
    solution = root(lambda x: x.sqrt() - 0.5, torch.tensor([[4.0]]), solver=solver, on_failure="raise")
    assert torch.allclose(solution.value, torch.tensor([[0.25]]))


@pytest.mark.parametrize(
    ("solver", "n"),
    [(solver, 2) for solver in (Newton, Broyden, GMRES, Auto, Anderson, Picard)]
    + [(solver, 300) for solver in (Newton, Broyden, Anderson)],  # too many for a Jacobian
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_root_is_never_claimed(solver, n, dtype):
    factors = 1 + 0.1 * torch.arange(n, dtype=dtype)
    traps = {
        "exp": torch.exp,
        "x² + 1": lambda x: x * x + 1,
        "1/x": lambda x: 1 / x,
        "exp(-x²)": lambda x: torch.exp(-x * x),
        "1/(1 + x²)": lambda x: 1 / (1 + x * x),
        "of unlike sizes": lambda x: factors * torch.exp(x),
        "mixed": lambda x: torch.exp(x).roll(1, -1),
    }
    for name, g in traps.items():
        start = torch.linspace(0.5, 1.0, n, dtype=dtype)[None]
        solution = root(g, start, solver=solver(max_steps=100), on_failure="ignore")
        assert not solution.converged.any(), name


@pytest.mark.parametrize("solver", [Newton(), Broyden()], ids=repr)
def test_a_root_at_zero_is_found(solver):
    solution = root(lambda x: torch.sinh(x), torch.ones(2, 3), solver=solver, on_failure="raise")
    assert solution.value.abs().max() < 1e-10


def test_a_large_state_is_solved_without_a_jacobian():
    b = torch.rand(3, 400, requires_grad=True)
    solution = root(lambda x, b: x + 0.5 * torch.sin(x.roll(1, 1)) - b, torch.zeros(3, 400), b, on_failure="raise")
    solution.value.sum().backward()
    assert solution.backward.converged.all()
    assert solution.steps.max() < 100


def test_a_state_of_parts_of_unlike_sizes():
    def g(s):
        x, y = s
        return x - 3e6 * y - 1e6, y.exp() - 1.001

    x, y = root(g, (torch.zeros(1, 2), torch.ones(1, 2)), on_failure="raise").value
    assert torch.allclose(y, torch.full((1, 2), 1.001).log(), rtol=digits(1e-9, 1e-4), atol=0.0)
    assert torch.allclose(x, 1e6 + 3e6 * y)


def test_nodes_that_influence_one_another():
    P, b = torch.rand(5, 5) / 5, torch.rand(5, 1, requires_grad=True)
    solution = root(lambda x: x - 0.5 * torch.tanh(P @ x) - b, torch.zeros(5, 1), coupled=True, on_failure="raise")
    x = solution.value
    (gradient,) = torch.autograd.grad(x.sum(), b)
    J = torch.eye(5) - 0.5 * (1 - torch.tanh(P @ x.detach()) ** 2) * P
    assert torch.allclose(gradient, torch.linalg.solve(J.t(), torch.ones(5, 1)))


@pytest.mark.float64
def test_second_derivatives():
    a = torch.tensor([[2.0, 3.0]], requires_grad=True)

    def solve(a):
        return root(lambda x, a: x**3 - a, torch.ones(1, 2), a, adjoint=ImplicitAdjoint(order=2, solver=Newton())).value

    assert torch.autograd.gradcheck(solve, a, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, a, fast_mode=True)


def test_newton_solves_an_adjoint_too():
    b = torch.randn(3, 4, requires_grad=True)
    A = 3 * torch.randn(4, 4)
    x = fixed_point(
        lambda x, b: x @ A.t() + b, torch.zeros(3, 4), b, solver=Newton(), adjoint=ImplicitAdjoint(solver=Newton())
    ).value
    (gradient,) = torch.autograd.grad(x.sum(), b)
    exact = torch.linalg.solve(torch.eye(4) - A.t(), torch.ones(4))
    assert torch.allclose(gradient, exact.expand(3, 4))


@pytest.mark.parametrize("off", [0.0, 1e-17, 1e-16])
def test_the_adjoint_of_a_singular_jacobian_is_a_miss(off):
    torch.manual_seed(0)
    M = torch.randn(3, 3)
    M[2] = M[0] + M[1] + off
    a = torch.randn(2, 3, requires_grad=True)
    solution = root(lambda x, a: x @ M.T - a @ M.T, a.detach().clone(), a, on_failure="ignore")
    solution.value.sum().backward()
    assert solution.converged.all()
    assert not solution.backward.converged.any()
