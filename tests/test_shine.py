"""SHINE: the forward solver's inverse estimate in the backward pass, and what it falls back on."""

from __future__ import annotations

import pytest
import torch

from implicitdl import (
    SHINE,
    Anderson,
    ArgumentError,
    Auto,
    ImplicitAdjoint,
    Monitor,
    PhantomGradient,
    Picard,
    fixed_point,
)
from implicitdl.equations.function import FunctionMap
from implicitdl.loop.iterate import iterate
from implicitdl.solvers import Broyden
from implicitdl.testing import check_adjoint

N, BATCH = 12, 4


@pytest.fixture
def problem():
    """tanh(xAᵀ + b) with one direction in which it hardly contracts, which a quasi-Newton solver has to learn."""
    A = 0.1 * torch.randn(N, N) / N**0.5 + 0.9 * torch.ones(N, N) / N
    b = (0.2 * torch.randn(BATCH, N)).requires_grad_()

    def f(x, b):
        return torch.tanh(x @ A.t() + b)

    return f, b


def gradient(problem, adjoint, g, solver=None):
    f, b = problem
    solver = Broyden() if solver is None else solver
    x = fixed_point(f, torch.zeros(BATCH, N), b, solver=solver, adjoint=adjoint).value
    return torch.autograd.grad(x, b, g)[0]


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)


def test_it_is_the_transposed_estimate(problem):
    f, b = problem
    g = torch.randn(BATCH, N)
    rows = FunctionMap("test", f, torch.zeros(BATCH, N), (b.detach(),))
    outcome = iterate(rows, torch.zeros(BATCH, N), Broyden(), keep_inverse=True)
    slope = 1 - f(outcome.x, b.detach()) ** 2
    assert torch.allclose(gradient(problem, SHINE(), g), slope * outcome.inverse.transpose_apply(g), atol=1e-12)


def test_it_is_closer_than_the_jacobian_free_gradient_where_the_solver_had_to_learn(problem):
    g = torch.ones(BATCH, N)
    exact = gradient(problem, ImplicitAdjoint(), g)
    shine, free = gradient(problem, SHINE(), g), gradient(problem, PhantomGradient(), g)
    assert (shine - exact).norm() < 0.5 * (free - exact).norm()
    assert cosine(shine, exact) > 0.9


@pytest.mark.float64
def test_in_one_dimension_it_is_exact():
    b = torch.tensor([[2.0], [3.0]], requires_grad=True)
    x = fixed_point(lambda x, b: 0.5 * torch.sin(x) + b, torch.zeros(2, 1), b, solver=Broyden(), adjoint=SHINE()).value
    x.sum().backward()
    assert torch.allclose(b.grad, 1 / (1 - 0.5 * torch.cos(x.detach())), rtol=1e-4)


def test_a_distrusted_estimate_falls_back_on_the_jacobian_free_gradient_sample_by_sample(problem):
    g = torch.randn(BATCH, N)
    free, trusted = gradient(problem, PhantomGradient(), g), gradient(problem, SHINE(), g)
    assert torch.allclose(gradient(problem, SHINE(fallback=1e-9), g), free)
    assert torch.allclose(gradient(problem, SHINE(fallback=1e9), g), trusted)
    f, b = problem
    rows = FunctionMap("test", f, torch.zeros(BATCH, N), (b.detach(),))
    v = iterate(rows, torch.zeros(BATCH, N), Broyden(), keep_inverse=True).inverse.transpose_apply(g)
    ratio = v.norm(dim=1) / g.norm(dim=1)
    bound = ratio.sort().values[1:3].mean().item()
    expected = torch.where((ratio <= bound).unsqueeze(1), trusted, free)
    assert torch.allclose(gradient(problem, SHINE(fallback=bound), g), expected)


def test_refined_to_the_tolerance_it_is_exact():
    check_adjoint(SHINE(refine=Auto()), Broyden())


def test_refinement_starts_at_the_estimate_and_a_miss_is_no_failure(problem, recwarn):
    g = torch.ones(BATCH, N)
    exact = gradient(problem, ImplicitAdjoint(), g)
    error = [
        (gradient(problem, adjoint, g) - exact).norm()
        for adjoint in (SHINE(), SHINE(refine=Anderson(max_steps=4)), SHINE(refine=Anderson(max_steps=8)))
    ]
    assert error[0] > error[1] > error[2]
    f, b = problem
    solution = fixed_point(f, torch.zeros(BATCH, N), b, solver=Broyden(), adjoint=SHINE(refine=Anderson(max_steps=2)))
    solution.value.sum().backward()
    assert (solution.backward.steps == 2).all()
    assert not solution.backward.converged.any()
    assert not list(recwarn)


def test_without_refinement_backward_is_one_product_with_the_jacobian(problem):
    f, b = problem
    backwards = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            backwards.append(1)
            return g

    with Monitor() as monitor:
        x = fixed_point(
            lambda x, b: Counted.apply(f(x, b)), torch.zeros(BATCH, N), b, solver=Broyden(), adjoint=SHINE()
        )
        x.value.sum().backward()
    assert len(backwards) == 1
    assert monitor.backward == []
    assert x.backward.steps is None


@pytest.mark.float64
def test_cotangents_of_any_size(problem):
    g = torch.randn(BATCH, N)
    one = gradient(problem, SHINE(fallback=2.0), g)
    assert torch.allclose(gradient(problem, SHINE(fallback=2.0), 1e-300 * g) * 1e300, one)
    assert (gradient(problem, SHINE(fallback=2.0), 0 * g) == 0).all()


def test_a_second_derivative_raises(problem):
    f, b = problem
    x = fixed_point(f, torch.zeros(BATCH, N), b, solver=Broyden(), adjoint=SHINE()).value
    (db,) = torch.autograd.grad(x.pow(2).sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match=r"Pass adjoint=ImplicitAdjoint\(order=2\)"):
        db.sum().backward()


def test_without_grad_nothing_is_kept(problem):
    f, b = problem
    with torch.no_grad():
        assert fixed_point(f, torch.zeros(BATCH, N), b, solver=Picard(), adjoint=SHINE()).converged.all()
    assert not fixed_point(f, torch.zeros(BATCH, N), b.detach(), solver=Broyden(), adjoint=SHINE()).value.requires_grad


def test_bad_arguments_are_worded(problem):
    f, b = problem
    with pytest.raises(ArgumentError, match=r"keeps an estimate of the inverse, got Picard. Use solver=Broyden\(\)"):
        fixed_point(f, torch.zeros(BATCH, N), b, solver=Picard(), adjoint=SHINE())
    with pytest.raises(ArgumentError, match="fallback to be a positive finite number, got 0"):
        SHINE(fallback=0)
    with pytest.raises(ArgumentError, match="refine to be a Solver, got 5"):
        SHINE(refine=5)
