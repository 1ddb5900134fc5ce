"""No claim without a solution: what grows for ever is never solved, and what is hard is still found."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

from implicitdl import (
    GMRES,
    Aitken,
    Anderson,
    Auto,
    Broyden,
    Equilibrium,
    ImplicitAdjoint,
    Newton,
    Picard,
    fixed_point,
)
from implicitdl.activations import IDENTITY, RELU
from implicitdl.solution import Status
from precision import digits

# Without a fixed point; the relative residual falls as x grows.
TRAPS = {
    "x + 1": lambda x: x + 1,
    "√(x² + 1)": lambda x: (x * x + 1).sqrt(),
    "x + 1/(1 + |x|)": lambda x: x + 1 / (1 + x.abs()),
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "x + exp(−x)": lambda x: x + (-x).exp(),
    "x + exp(−x²)": lambda x: x + (-x * x).exp(),
    "x + log(1 + |x|) + 0.1": lambda x: x + torch.log1p(x.abs()) + 0.1,
    "x + tanh(x) + 0.2": lambda x: x + torch.tanh(x) + 0.2 + x.abs(),
}
SOLVERS = [
    Auto(), Auto(slow=Broyden()), Picard(), Aitken(), Anderson(), Broyden(), Broyden(line_search=False), Newton(),
    Newton(dense=False), GMRES(),
]  # fmt: skip
by_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def walks_beside_another(x):
    """A number that grows for ever beside one that settles."""
    return torch.cat([x[:, :1] + 1, 0.5 * x[:, 1:] + 1e3], dim=1)


def rounded_away(f, x):
    """Where rounding hides what f adds to x, far out: in the numbers of the dtype, that is a solution."""
    left = torch.linalg.vector_norm(f(x) - x, dim=1)
    return left <= 4 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x, dim=1)


def trapped(x, which):
    """A trap a row, by its number."""
    return torch.stack([f(x) for f in TRAPS.values()]).gather(0, which.expand_as(x)[None])[0]


@by_solver
@by_dtype
def test_a_map_without_a_solution_is_never_claimed(solver, dtype):
    x0 = torch.tensor([[0.0, 0.0], [0.3, 1.0]], dtype=dtype).repeat(len(TRAPS), 1)
    which = torch.arange(len(TRAPS)).repeat_interleave(2)[:, None]
    with torch.no_grad():
        solution = fixed_point(trapped, x0, which, solver=solver, on_failure="ignore")
        exact = rounded_away(lambda x: trapped(x, which), solution.value)
    assert not (solution.converged & ~exact).any()
    assert ((solution.residual > solver.tolerance(dtype)) | exact).all()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@by_dtype
def test_a_number_that_walks_beside_one_that_settles_is_never_claimed(solver, dtype):
    with torch.no_grad():
        solution = fixed_point(walks_beside_another, torch.zeros(1, 2, dtype=dtype), solver=solver, on_failure="ignore")
    assert not (solution.converged & ~rounded_away(walks_beside_another, solution.value)).any()


def affine(x, A, c):
    return (x.unsqueeze(1) * A).sum(dim=-1) + c


def walking_beside_settling(number):
    """Affine maps with one to three eigenvalues of 1, along which they step for ever; every second one is rotated.

    The rates are multiples of 1/16 and the rotations have entries of ±1/2, so that the products are exact: an eigenvalue
    that rounding leaves beside 1 would belong to a map with a solution.  The steps along 1 are above the tolerance
    relative to where the other numbers settle: a state there with smaller ones is within it as the README defines it.
    """
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    rate, step = torch.randint(-14, 15, (number, 4)) / 16, 10 ** (2 * torch.rand(number, 4))
    for row in range(number):
        walking = slice(0, 1 + row % 3)
        rate[row, walking] = 1.0
        step[row, walking] = 10 ** torch.rand(4)[walking]
    A, c = torch.diag_embed(rate), step.clone()
    for row in range(1, number, 2):
        Q = hadamard[:, torch.randperm(4)] * (2 * torch.randint(0, 2, (4,)) - 1)
        A[row], c[row] = Q @ A[row] @ Q.t(), Q @ step[row]
    return A, c


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@by_dtype
def test_numbers_that_walk_beside_others_along_any_axes_are_never_claimed(solver, dtype):
    A, c = (part.to(dtype) for part in walking_beside_settling(100))
    with torch.no_grad():
        solution = fixed_point(affine, torch.zeros_like(c), A, c, solver=solver, on_failure="ignore")
    assert not solution.converged.any()


def far_solutions(number, n=5):
    """Contractive affine maps with solutions of 1e6 to 1e12 beside a small one, every second one with a copy."""
    draw = partial(torch.rand, dtype=torch.float64)
    rate, x = 1.6 * draw(number, n) - 0.7, 10 ** (6 + 6 * draw(number, n))
    x[:, 0] = 10 ** draw(number)
    A = torch.diag_embed(rate)
    copies = torch.arange(0, number, 2)
    source = torch.randint(2, n, copies.shape)
    A[copies, 1] = 0.0
    A[copies, 1, source], x[copies, 1] = 1.0, x[copies, source]
    return A, x - (A @ x.unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@by_dtype
def test_solutions_far_away_are_claimed(solver, dtype):
    A, c = (part.to(dtype) for part in far_solutions(100))
    with torch.no_grad():
        solution = fixed_point(affine, torch.zeros_like(c), A, c, solver=solver, on_failure="ignore")
    assert solution.converged.all()


@pytest.mark.parametrize("solver", [Anderson(), Broyden(line_search=False), Newton()], ids=repr)
def test_a_part_that_walks_beside_one_that_settles_is_never_claimed(solver):
    def f(state):
        return state[0] + 1, 0.5 * state[1] + 1e3

    with torch.no_grad():
        solution = fixed_point(f, (torch.zeros(1, 2), torch.zeros(1, 3)), solver=solver, on_failure="ignore")
    assert not solution.converged.any()


@pytest.mark.parametrize("solver", [Anderson(), Broyden(line_search=False), Newton(), GMRES()], ids=repr)
def test_an_adjoint_equation_that_walks_is_never_claimed(solver):
    """v = g + Jᵀv with a 1 on the diagonal of J has no solution."""
    x = torch.zeros(1, 2, requires_grad=True)
    b = torch.tensor([[0.0, 1e3]], requires_grad=True)
    solution = fixed_point(
        lambda x, b: x * torch.tensor([1.0, 0.5]) + b, x, b, adjoint=ImplicitAdjoint(solver=solver), on_failure="ignore"
    )
    (solution.value * torch.tensor([1.0, 1e3])).sum().backward()
    assert not solution.backward.converged.any()


@pytest.mark.parametrize("solver", [Auto, Anderson, Newton])
def test_a_loose_tolerance_claims_no_more(solver):
    for name, rtol in (
        *product(("√(x² + 1)", "x + 1/(1 + |x|)"), (1e-2, 1e-4)),
        # It approaches no solution by steps of 1, which are below √rtol of x from 1/√rtol on.
        ("softplus", 1e-4),
    ):
        solution = fixed_point(TRAPS[name], torch.zeros(1, 1), solver=solver(rtol=rtol), on_failure="ignore")
        assert not (solution.converged & ~rounded_away(TRAPS[name], solution.value)).any(), (name, rtol)


@pytest.mark.parametrize("activation", [RELU, IDENTITY], ids=lambda a: a.name)
@by_dtype
def test_an_equilibrium_with_an_eigenvalue_of_one_is_never_claimed(activation, dtype):
    for A, x0 in product(
        ([[1.0, 0.0], [0.0, 0.5]], [[1.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]),
        (None, torch.zeros(1, 2, dtype=dtype)),
    ):
        f = Equilibrium(torch.tensor(A, dtype=dtype), torch.tensor([[1.0, 1e3]], dtype=dtype), activation)
        solution = fixed_point(f, x0, on_failure="ignore")
        assert not (solution.converged & ~rounded_away(f, solution.value)).any(), (A, x0)


@pytest.mark.parametrize("solver", [Auto(), Anderson(), Broyden(memory=20), Newton(), GMRES()], ids=repr)
def test_a_slow_map_whose_solution_is_far_from_its_start_is_solved(solver):
    for rate in (0.9, 0.999, 0.9999):
        c = torch.tensor([[rate, 0.5, 0.1], [rate, -0.5, 0.0]])
        solution = fixed_point(lambda x, c: c * x + 1, torch.zeros(2, 3), c, solver=solver)
        assert solution.converged.all(), rate
        assert torch.allclose(solution.value, 1 / (1 - c), rtol=digits(1e-5, 1e-5 / (1 - rate))), rate
        assert solution.steps.max() < 20, rate


@pytest.mark.parametrize("solver", [Broyden(), Newton(), GMRES()], ids=repr)
def test_a_map_that_expands_is_solved(solver):
    u = torch.tensor([[1.0, 2.0]])
    solution = fixed_point(lambda x, u: 3 * x + u, torch.zeros(1, 2), u, solver=solver)
    assert torch.allclose(solution.value, -u / 2)
    assert int(solution.steps) <= 5


@by_solver
def test_a_start_at_the_solution_is_claimed_at_once(solver):
    solution = fixed_point(lambda x: 0.5 * x + 1, torch.full((2, 3), 2.0), solver=solver)
    assert (solution.steps == 1).all()


@by_solver
def test_a_solution_that_is_zero_is_found_and_is_zero(solver):
    for rate in (0.5, 0.97):
        patient = type(solver)(max_steps=1000)
        solution = fixed_point(lambda x, a=rate: a * torch.sin(x), torch.ones(2, 3), solver=patient)
        assert solution.converged.all(), rate
        assert (solution.value == 0).all(), rate
        assert (solution.residual == 0).all(), rate


def test_a_solution_far_below_the_start_is_not_taken_for_zero():
    solution = fixed_point(lambda x: 0.5 * x + 1e-20, torch.ones(1, 2), solver=Picard())
    assert torch.allclose(solution.value, torch.full((1, 2), 2e-20), rtol=digits(1e-5, 1e-4), atol=0.0)


def test_substitution_is_exact_however_much_its_solution_grows():
    A = 5 * torch.randn(20, 20).triu(1)
    f = Equilibrium(A, torch.randn(50, 20), IDENTITY, triangular=True)
    solution = fixed_point(f, torch.zeros(50, 20), on_failure="raise")
    assert solution.value.abs().max() > 1e8
    assert solution.steps.max() <= 3


def status(f, solver, x0=0.0):
    outcome = fixed_point(f, torch.full((1, 2), x0), solver=solver, on_failure="ignore")
    return Status(int(outcome.stats.status))


def test_the_status_says_why_a_row_ended():
    assert status(lambda x: 0.5 * torch.cos(x), Picard()) == Status.CONVERGED
    assert status(lambda x: 0.99 * x + 1, Picard(max_steps=50)) == Status.OUT_OF_STEPS
    assert status(lambda x: 3 * x + 1, Picard(max_steps=50)) == Status.RUNS_AWAY
    assert status(lambda x: x + 1, Anderson()) == Status.RUNS_AWAY
    assert status(lambda x: torch.sqrt(0.5 - x), Picard()) == Status.NOT_FINITE
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert status(lambda x: x @ turn + 1, Picard(max_steps=50)) == Status.STALLED
