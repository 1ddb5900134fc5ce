"""Every solver on every problem, and the loop's promises."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch

from implicitdl import (
    Anderson,
    ArgumentError,
    Auto,
    ConvergenceError,
    Equilibrium,
    ImplicitFunctionWarning,
    Monitor,
    Picard,
    Substitution,
    fixed_point,
    root,
)
from implicitdl.activations import TANH
from implicitdl.testing import (
    EXPANDING_SOLVERS,
    MONOTONE_SOLVERS,
    SOLVERS,
    check_solver,
    expanding_problems,
    monotone_problems,
    problems,
)

CASES = [
    *product(SOLVERS, problems()),
    *product(EXPANDING_SOLVERS, expanding_problems()),
    *product(MONOTONE_SOLVERS, monotone_problems()),
]


@pytest.mark.parametrize(("solver", "problem"), CASES, ids=lambda part: getattr(part, "name", None) or repr(part))
def test_solver_on_problem(solver, problem):
    check_solver(solver, problem)


def test_easy_samples_of_a_mixed_batch_cost_their_own_steps_only():
    (mixed,) = [p for p in problems() if p.name == "mixed"]
    called = []

    def counted(x, *args):
        called.append(x.shape[0])
        return mixed.f(x, *args)

    steps = fixed_point(counted, mixed.x0, *mixed.args, solver=Picard(max_steps=3000)).steps
    assert steps[0] < steps[1] < steps[2] < steps[3]
    assert sum(called) < 0.6 * len(called) * len(mixed.x0), "finished samples were still evaluated"


def test_a_miss_is_reported_with_counts_the_worst_residual_and_what_to_do():
    message = (
        r"fixed_point\(Picard\): 1 of 2 samples did not reach rtol=1e-04 in 20 steps "
        r"\(worst residual \d\.\de-\d\d\)\. The residual was still falling: raise max_steps"
    )
    rate = torch.tensor([[0.1], [0.999]])

    def solve(on_failure):
        return fixed_point(
            lambda x, c: c * x + 1, torch.zeros(2, 1), rate,
            solver=Picard(rtol=1e-4, max_steps=20), on_failure=on_failure,
        )  # fmt: skip

    with pytest.warns(ImplicitFunctionWarning, match=message):
        solution = solve("warn")
    assert solution.converged.tolist() == [True, False]
    with pytest.raises(ConvergenceError, match=message):
        solve("raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve("ignore")


@pytest.mark.parametrize("solver", [Anderson(), Auto()], ids=repr)
def test_acceleration_on_a_nonnegative_matrix_of_norm_099(solver):
    n = 100
    A = torch.rand(n, n)
    f = Equilibrium(0.99 * A / A.sum(dim=1, keepdim=True), torch.rand(8, n))
    plain = fixed_point(f, torch.zeros(8, n), solver=Picard(max_steps=5000))
    fast = fixed_point(f, torch.zeros(8, n), solver=solver)
    assert fast.converged.all()
    assert fast.steps.max() * 20 < plain.steps.min()


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_anderson_and_auto_are_not_slower_than_picard_on_easy_maps(rate):
    A = rate * torch.linalg.qr(torch.randn(50, 50))[0]
    b = torch.randn(6, 50)

    def steps(solver):
        return fixed_point(lambda x, b: torch.tanh(x @ A.t() + b), torch.zeros(6, 50), b, solver=solver).steps

    assert (steps(Anderson()) <= steps(Picard())).all()
    assert (steps(Auto()) <= steps(Picard())).all()


def test_anderson_is_invariant_to_the_scale_of_the_state():
    A = 0.9 * torch.linalg.qr(torch.randn(20, 20))[0]
    b = torch.randn(3, 20)

    def steps(scale):
        return fixed_point(lambda x, b: x @ A.t() + b, torch.zeros(3, 20), scale * b, solver=Anderson()).steps.tolist()

    assert steps(1e-12) == steps(1.0) == steps(1e12)


def test_picard_with_damping_solves_a_map_that_rotates_out():
    def turn(x):
        return torch.stack((-1.05 * x[:, 1] + 1, 1.05 * x[:, 0]), dim=1)

    with pytest.warns(ImplicitFunctionWarning):
        assert not fixed_point(turn, torch.zeros(1, 2), solver=Picard()).converged.any()
    assert fixed_point(turn, torch.zeros(1, 2), solver=Picard(damping=0.4, max_steps=1000)).converged.all()


def test_max_steps_counts_evaluations_of_f():
    calls = []

    def f(x):
        calls.append(1)
        return x + 1

    for solver in (Picard(max_steps=7), Anderson(max_steps=7), Auto(max_steps=7)):
        calls.clear()
        solution = fixed_point(f, torch.ones(1, 1), solver=solver, on_failure="ignore")
        assert len(calls) - 1 <= 7  # one more under autograd, for the adjoint
        assert int(solution.steps) == len(calls) - 1


def test_trace_has_the_residual_of_every_evaluation_and_nan_after_the_end():
    rate = torch.tensor([[0.1], [0.9]])
    solution = fixed_point(lambda x, c: c * x + 1, torch.zeros(2, 1), rate, solver=Picard(max_steps=400), trace=True)
    assert solution.trace.shape == (int(solution.steps.max()), 2)
    for sample, steps in enumerate(solution.steps.tolist()):
        column = solution.trace[:, sample]
        assert torch.isfinite(column[:steps]).all()
        assert torch.isnan(column[steps:]).all()
        assert column[steps - 1] == solution.residual[sample]


def test_states_of_several_tensors_of_different_shapes():
    def f(state, u):
        x, y = state
        return torch.tanh(0.3 * x + u[:, :, None]), 0.5 * y + x.sum(dim=(1, 2))[:, None]

    u = torch.randn(4, 2, requires_grad=True)
    solution = fixed_point(f, (torch.zeros(4, 2, 3), torch.zeros(4, 1)), u)
    x, y = solution.value
    fx, fy = f((x, y), u)
    assert x.shape == (4, 2, 3)
    assert torch.allclose(fx, x, atol=1e-8)
    assert torch.allclose(fy, y, atol=1e-8)
    (x.sum() + y.sum()).backward()
    assert torch.isfinite(u.grad).all()


def test_one_value_per_sample_and_images():
    assert fixed_point(torch.cos, torch.zeros(5)).value.shape == (5,)
    assert fixed_point(lambda x: 0.5 * torch.cos(x), torch.zeros(5, 3, 4, 4)).value.shape == (5, 3, 4, 4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_works_in_every_grad_mode(mode):
    with mode():
        solution = fixed_point(lambda x, b: 0.5 * x + b, torch.zeros(2, 3), torch.ones(2, 3))
    assert solution.converged.all()
    assert not solution.value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_default_tolerance_is_reached_in_every_dtype(dtype):
    b = torch.randn(4, 8).to(dtype)
    solution = fixed_point(lambda x, b: torch.tanh(0.5 * x + b), torch.zeros_like(b), b)
    assert solution.converged.all()
    assert solution.value.dtype == dtype


def test_float32_has_no_warnings_for_large_states(recwarn):
    b = 1e6 * torch.randn(4, 50, dtype=torch.float32)
    A = torch.randn(50, 50, dtype=torch.float32) / 100
    assert fixed_point(Equilibrium(A, b), torch.zeros_like(b)).converged.all()
    assert not list(recwarn)


def test_the_start_is_neither_changed_nor_shared():
    x0 = torch.full((2, 1), 2.0)
    solution = fixed_point(lambda x, b: 0.5 * x + b, x0, torch.ones(2, 1))
    solution.value.add_(1.0)
    assert torch.equal(x0, torch.full((2, 1), 2.0))


def test_substitution_is_exact_where_iteration_would_overflow():
    n = 70  # more than two blocks of columns
    A = (10 * torch.randn(n, n, dtype=torch.float64)).triu(1)
    b = torch.randn(3, n, dtype=torch.float64)
    f = Equilibrium(A, b, TANH, triangular=True)
    for solver in (Auto(), Substitution()):
        solution = fixed_point(f, torch.zeros_like(b), solver=solver)
        assert solution.residual.max() < 1e-13
        assert (solution.steps == 3).all()
    with pytest.raises(ArgumentError, match="strictly triangular A, got Equilibrium"):
        fixed_point(Equilibrium(A, b), torch.zeros_like(b), solver=Substitution())


def test_root():
    a = torch.rand(5, 1, dtype=torch.float64) + 1
    solution = root(lambda x, a: 0.3 * (x * x - a), torch.ones_like(a), a)
    assert torch.allclose(solution.value, a.sqrt())


def test_monitors_nest_and_close():
    with Monitor() as outer:
        fixed_point(torch.cos, torch.zeros(3, 1))
        with Monitor() as inner:
            fixed_point(torch.cos, torch.zeros(2, 1))
    fixed_point(torch.cos, torch.zeros(4, 1))
    assert (outer.samples, inner.samples) == (5, 2)
    assert outer.missed == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fixed_point(torch.cos, torch.zeros(0, 3)), r"x0 of shape \(batch ≥ 1, \*state\), got \(0, 3\)"),
        (lambda: fixed_point(torch.cos, torch.zeros(2, 3, dtype=torch.int64)), "floating-point tensors, one or a tuple of them, got torch.int64"),
        (lambda: fixed_point(torch.cos, [1.0]), "floating-point tensors, one or a tuple of them, got list"),
        (lambda: fixed_point(torch.cos, torch.zeros(2, 1), solver=Picard), "solver to be a Solver"),
        (lambda: fixed_point(torch.cos, torch.zeros(2, 1), adjoint="exact"), "adjoint to be an Adjoint"),
        (lambda: fixed_point(torch.cos, torch.zeros(2, 1), on_failure="shout"), "one of raise, warn, ignore, got 'shout'"),
        (lambda: fixed_point(lambda x, u: x, torch.zeros(2, 1), torch.zeros(3, 1)), r"\(batch=2, ...\), got \(3, 1\)"),
        (lambda: fixed_point(lambda x, u: x, torch.zeros(2, 1), 3.0), "got float. Let f close over what is no data"),
        (lambda: fixed_point(lambda x: x[:, :1], torch.zeros(2, 3)), r"f to return shape \[\(2, 3\)\], got \[\(2, 1\)\]"),
        (lambda: fixed_point(torch.cos, (torch.zeros(2, 1), torch.zeros(3, 1))), "share batch size and dtype"),
        (lambda: Picard(rtol=-1.0), "rtol strictly between 0 and 1, got -1.0"),
        (lambda: Picard(rtol=0.0), "rtol strictly between 0 and 1, got 0.0"),
        (lambda: Picard(max_steps=0), "max_steps to be a positive integer, got 0"),
        (lambda: Picard(damping=0.0), r"damping in \(0, 2\], got 0.0"),
        (lambda: Anderson(memory=0), "memory to be a positive integer"),
    ],
)  # fmt: skip
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_a_typo_in_a_setting_is_a_type_error():
    with pytest.raises(TypeError, match="max_iter"):
        Anderson(max_iter=10)
    with pytest.raises(TypeError, match="max_iter"):
        fixed_point(torch.cos, torch.zeros(1, 1), max_iter=10)
