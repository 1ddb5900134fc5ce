"""What the words of a miss say: how many steps were taken, why the solve ended, and the change that helps."""

from __future__ import annotations

import warnings

import pytest
import torch

from implicitdl import (
    Anderson,
    Auto,
    Broyden,
    ConvergenceError,
    Equilibrium,
    ImplicitAdjoint,
    ImplicitFunctionWarning,
    Newton,
    Picard,
    Status,
    fixed_point,
    root,
)


def words(f, x0, *args, **options):
    with pytest.warns(ImplicitFunctionWarning) as caught:
        solution = f(x0, *args, **options) if f is root else fixed_point(f, x0, *args, **options)
    assert len(caught) == 1
    return str(caught[0].message), solution


@pytest.mark.parametrize("solver", [Auto(), Picard(), Anderson()], ids=repr)
def test_a_map_that_expands_names_newton_and_newton_solves_it(solver):
    f = lambda x, u: 3 * x + u  # noqa: E731
    u = torch.ones(4, 3)
    text, solution = words(f, torch.zeros(4, 3), u, solver=solver)
    assert "the map expands" in text
    assert "Newton()" in text
    assert solution.status.tolist() == [Status.RUNS_AWAY] * 4
    assert fixed_point(f, torch.zeros(4, 3), u, solver=Newton()).converged.all()


def test_nan_is_named_with_the_step_that_met_it():
    text, solution = words(lambda x: (x - 1.5).sqrt(), torch.zeros(4, 3))
    assert "in 1 step " in text
    assert "f was not finite at step 1" in text
    assert solution.status.tolist() == [Status.NOT_FINITE] * 4


def test_a_slow_solve_is_told_to_go_on_and_does():
    f = lambda x, u: 0.9 * x + u  # noqa: E731
    text, solution = words(f, torch.zeros(4, 3), torch.ones(4, 3), solver=Picard(max_steps=20))
    assert "in 20 steps" in text
    assert "still falling: raise max_steps" in text
    assert solution.status.tolist() == [Status.OUT_OF_STEPS] * 4
    assert fixed_point(f, torch.zeros(4, 3), torch.ones(4, 3), solver=Picard(max_steps=400)).converged.all()


def test_broyden_that_stalls_names_its_memory():
    torch.manual_seed(0)
    J = 3 * torch.randn(80, 80) / 80**0.5
    f = lambda x, u: x @ J.t() + u  # noqa: E731
    text, _ = words(f, torch.zeros(2, 80), torch.ones(2, 80), solver=Broyden(memory=5, max_steps=200))
    assert "raise memory, which is 5" in text


def test_the_rounding_of_the_dtype_is_named():
    torch.manual_seed(0)
    J = (0.9 * torch.linalg.qr(torch.randn(200, 200))[0]).float()
    text, _ = words(
        lambda x: torch.tanh(x @ J.t()) + 0.1, torch.ones(2, 200).float(), solver=Picard(rtol=1e-12, max_steps=999)
    )
    assert "rounding of float32" in text


def test_samples_that_miss_in_different_ways_are_told_apart():
    rate = torch.tensor([[0.5], [0.995], [3.0]])
    text, solution = words(lambda x, a: a * x + 1, torch.zeros(3, 1), rate, solver=Picard(max_steps=40))
    assert "2 of 3 samples" in text
    assert "in 1 of them" in text
    assert solution.status.tolist() == [Status.CONVERGED, Status.OUT_OF_STEPS, Status.RUNS_AWAY]


def test_backward_names_gmres_and_gmres_solves_it():
    w = torch.tensor(1.5, requires_grad=True)
    f = lambda x: w * x - 1  # noqa: E731
    x = fixed_point(f, torch.zeros(4, 1), solver=Newton(), adjoint=ImplicitAdjoint(solver=Picard())).value
    with pytest.warns(ImplicitFunctionWarning, match=r"backward\(Picard\).*ImplicitAdjoint\(solver=GMRES\(\)\)"):
        x.sum().backward()


def test_a_root_is_called_one():
    text, _ = words(root, lambda x: x * x + 1, torch.ones(2, 1))
    assert text.startswith("root(Newton): 2 of 2 samples")
    assert "no solution" in text


def test_raise_says_the_same():
    with pytest.raises(ConvergenceError, match="the map expands"):
        fixed_point(lambda x: 3 * x + 1, torch.zeros(2, 1), on_failure="raise")


def test_a_solution_that_is_found_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = fixed_point(lambda x: 0.5 * x + 1, torch.zeros(2, 1))
    assert solution.status.tolist() == [Status.CONVERGED] * 2


@pytest.mark.parametrize("solver", [Auto(), Anderson(), Broyden(), Newton()], ids=repr)
def test_a_state_whose_squares_overflow_is_not_said_to_expand(solver):
    A = torch.tensor([[0.3, 0.4], [0.2, 0.5]], dtype=torch.float32)
    f = Equilibrium(A, torch.full((1, 2), 1e27, dtype=torch.float32))
    with pytest.warns(
        ImplicitFunctionWarning, match="squares of the state overflow float32: measure it in other units"
    ):
        fixed_point(f, None, solver=solver)
