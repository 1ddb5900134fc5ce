"""What breaks in other libraries' solvers, given to ours: each test is named after what goes wrong there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from implicitdl import (
    Aitken,
    Anderson,
    ArgumentError,
    Auto,
    Equilibrium,
    ImplicitFunctionWarning,
    Newton,
    Picard,
    fixed_point,
)
from implicitdl.testing import MONOTONE_SOLVERS, SOLVERS
from precision import digits

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


@every_solver
def test_an_easy_sample_takes_as_many_steps_in_a_mixed_batch_as_alone_and_has_the_same_answer(solver):
    rate = torch.tensor([[0.05], [0.5], [0.97]])
    target = torch.randn(3, 4)

    def f(x, c, t):
        return c * torch.sin(x) + t

    together = fixed_point(f, torch.zeros(3, 4), rate, target, solver=solver)
    for i in range(3):
        alone = fixed_point(f, torch.zeros(1, 4), rate[i : i + 1], target[i : i + 1], solver=solver)
        assert alone.steps == together.steps[i]
        assert torch.allclose(alone.value[0], together.value[i], rtol=1e-9)
    assert together.steps[0] < together.steps.max()


@every_solver
def test_a_sample_that_turns_nan_keeps_its_last_finite_iterate_is_flagged_and_leaves_the_others_alone(solver):
    # The second sample's iterates rise to the edge of the square root's domain and leave it.
    u = torch.tensor([[0.5, 0.1], [0.5, 3.0], [0.2, 0.3]])

    def f(x, u):
        return torch.sqrt(2 - u * x) * u

    solution = fixed_point(f, torch.zeros(3, 2), u, solver=solver, on_failure="ignore")
    without = fixed_point(f, torch.zeros(2, 2), u[[0, 2]], solver=solver)
    assert solution.converged[[0, 2]].all()
    # Line searches come back from beyond the edge, and find the second solution too.
    left = torch.linalg.vector_norm(f(solution.value, u) - solution.value, dim=1)
    assert (left[solution.converged] < digits(1e-8, 1e-4)).all()
    assert torch.isfinite(solution.value).all()
    assert torch.isfinite(solution.residual[1])
    assert torch.equal(solution.steps[[0, 2]], without.steps)
    assert torch.allclose(solution.value[[0, 2]], without.value)


@every_solver
def test_a_map_without_a_solution_is_warned_of_with_counts_and_the_worst_residual(solver):
    u = torch.tensor([[0.0], [1.0], [1.0]])
    message = rf"fixed_point\({type(solver).__name__}\): 2 of 3 samples did not reach .* \(worst residual \d\.\de"
    with pytest.warns(ImplicitFunctionWarning, match=message):
        solution = fixed_point(lambda x, u: u * (x * x + 1) + 0.1, torch.ones(3, 1), u, solver=solver)
    assert solution.converged.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_divergence_whose_squares_overflow_is_no_convergence(dtype):
    solver = Picard(max_steps=2000)
    with pytest.warns(ImplicitFunctionWarning, match="3 of 3 samples did not reach"):
        solution = fixed_point(
            lambda x, u: 2 * x + u, torch.zeros(3, 5, dtype=dtype), torch.ones(3, 5, dtype=dtype), solver=solver
        )
    assert (solution.residual > 0.1).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e15, 1e25])
def test_a_state_whose_squares_leave_the_range_of_the_dtype_is_solved_like_any_other(scale):
    u = torch.tensor([[1.0, 2.0]], dtype=torch.float32)
    solutions = [fixed_point(lambda x, u: 0.5 * x + u, 0 * u, u * s, solver=Picard()) for s in (1.0, scale)]
    assert all(solution.converged.all() for solution in solutions)
    assert torch.equal(*(solution.steps for solution in solutions))
    assert torch.allclose(solutions[1].value / scale, solutions[0].value)


# Where squares, and squares of differences as small as the tolerance, are ordinary numbers.
SCALES = [(torch.float32, 1e-12), (torch.float32, 1e15), (torch.float64, 1e-100), (torch.float64, 1e100)]


class TestAStateOfAnyScale:
    """The solver works on it as on ordinary numbers: after about as many steps, to the same digits."""

    @staticmethod
    def check(solver, build):
        for dtype, scale in SCALES:
            b = torch.tensor([[1.0, 2.0, 0.5], [0.3, 0.2, 1.0]], dtype=dtype)
            A = torch.tensor([[0.5, 0.3, 0.0], [-0.4, 0.5, 0.2], [0.0, 0.1, 0.6]], dtype=dtype)
            # The first row is an ordinary sample, which must not notice its batch-mate.
            units = torch.tensor([[1.0], [scale]], dtype=torch.float64)
            f, *args = build(A, (b.double() * units).to(dtype))
            usual, *usual_args = build(A, b)
            solution = fixed_point(f, torch.zeros_like(b), *args, solver=solver, on_failure="raise")
            ordinary = fixed_point(usual, torch.zeros_like(b), *usual_args, solver=solver)
            tolerance = 20 * solver.tolerance(dtype)
            found, expected = solution.value.double() / units, ordinary.value.double()
            assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance), (dtype, scale)
            assert torch.allclose(solution.value[0], ordinary.value[0], rtol=tolerance), (dtype, scale)
            assert solution.steps[1] <= ordinary.steps[1] + 20, (dtype, scale)

    @pytest.mark.parametrize("solver", [Picard(), Aitken(), Auto(), Newton(dense=True)], ids=repr)
    def test_beside_an_ordinary_sample_whose_bits_stay_where_those_of_f_do(self, solver):
        for dtype, scale in SCALES:
            A = torch.tensor([[0.5, 0.3, 0.0], [-0.4, 0.5, 0.2], [0.0, 0.1, 0.6]], dtype=dtype)
            u = torch.tensor([[1.0, 2.0, 0.5], [0.3, 0.2, 1.0]], dtype=dtype)
            beside = (u.double() * torch.tensor([[1.0], [scale]], dtype=torch.float64)).to(dtype)

            def f(x, u, A=A):
                return (x[:, None] * A).sum(-1) + u  # row by row, where a product's bits depend on how many rows it has

            one, other = (fixed_point(f, torch.zeros_like(u), b, solver=solver) for b in (u, beside))
            assert torch.equal(one.value[0], other.value[0]), (dtype, scale)
            assert one.steps[0] == other.steps[0], (dtype, scale)

    @every_solver
    def test_by_a_function(self, solver):
        self.check(solver, lambda A, b: (lambda x, u: x @ A.t() + u, b))

    @pytest.mark.parametrize("solver", [*SOLVERS, *MONOTONE_SOLVERS], ids=repr)
    def test_by_an_equilibrium(self, solver):
        self.check(solver, lambda A, b: (Equilibrium(A, b),))

    @every_solver
    def test_with_gradients(self, solver):
        for dtype, scale in ((torch.float32, 1e-12), (torch.float64, 1e-100)):
            u = torch.tensor([[1.0, 2.0], [0.1, 0.3]], dtype=dtype).mul(scale).requires_grad_()
            x = fixed_point(lambda x, u: torch.tanh(0.7 * x + u), torch.zeros_like(u), u, solver=solver).value
            x.sum().backward()
            assert torch.allclose(u.grad, torch.full_like(u, 1 / 0.3), rtol=1e-4), dtype

    @pytest.mark.parametrize("scale", [1e-305, 1e-200, 1e-163, 1e160, 1e300])
    def test_the_verdict_is_right_where_squares_leave_the_range_of_the_dtype(self, scale):
        u = torch.tensor([[1.0, 2.0]], dtype=torch.float64) * scale
        solution = fixed_point(lambda x, u: 0.5 * x + u, 0 * u, u)
        assert solution.converged.all()
        assert torch.allclose(solution.value / scale, 2 * u / scale, rtol=1e-9)

    @pytest.mark.parametrize("scale", [1e-200, 1e-163, 1.0, 1e150])
    def test_substitution_is_exact(self, scale):
        A = torch.tensor([[0.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
        f = Equilibrium(A, scale * torch.ones(2, 2, dtype=torch.float64), triangular=True)
        solution = fixed_point(f, torch.zeros(2, 2, dtype=torch.float64))
        assert solution.converged.all()
        assert torch.allclose(solution.value / scale, torch.tensor([[4.0, 1.0]], dtype=torch.float64))

    def test_with_an_absolute_tolerance_of_its_own_size(self):
        u = torch.tensor([[1.0, 2.0]], dtype=torch.float64) * 1e-200
        solutions = [
            fixed_point(lambda x, u: 0.5 * x + u, 0 * u, u, solver=Picard(rtol=1e-12, atol=atol))
            for atol in (0.0, 1e-204, 1e-198)
        ]
        assert [int(solution.steps) for solution in solutions] == [40, 16, 1]

    def test_a_divergence_returns_the_best_iterate_from_before(self):
        def f(x):
            return torch.where(x.abs() > 100, x**2, 1.5 * x + 30)

        x0 = torch.tensor([[40.0]], dtype=torch.float64)
        solution = fixed_point(f, x0, solver=Picard(), on_failure="ignore")
        assert not solution.converged.any()
        measured = (f(solution.value) - solution.value).norm() / f(solution.value).norm()
        assert torch.allclose(solution.residual, measured.reshape(1))
        assert float(solution.value) < 1e3


@every_solver
def test_a_state_that_has_grown_until_any_step_is_within_its_tolerance_is_no_solution(solver):
    u = torch.tensor([[0.3, -0.2], [1.0, 0.5]], dtype=torch.float32)
    with pytest.warns(ImplicitFunctionWarning, match="2 of 2 samples did not reach"):
        solution = fixed_point(lambda x, u: x + u.exp(), torch.zeros_like(u), u, solver=solver)
    assert not solution.converged.any()


@every_solver
def test_a_solution_far_above_the_start_is_one_however_loose_the_tolerance(solver):
    loose = replace(solver, rtol=0.1, max_steps=2000)
    solution = fixed_point(lambda x, u: 0.95 * x + u, torch.zeros(2, 3), torch.rand(2, 3) + 0.1, solver=loose)
    assert solution.converged.all()


@every_solver
def test_a_state_that_shrinks_to_zero_has_arrived(solver):
    solution = fixed_point(lambda x: 0.1 * torch.sin(x), torch.ones(2, 3, dtype=torch.float32), solver=solver)
    assert solution.converged.all()
    assert solution.value.abs().max() < 1e-10


def test_a_start_far_above_the_solution_is_no_reason_to_stop_early():
    u = torch.ones(1, 2, dtype=torch.float32)
    solution = fixed_point(lambda x, u: 0.5 * x + u, torch.full_like(u, 1e15), u)
    assert torch.allclose(solution.value, 2 * u, rtol=1e-4)


class TestAMapThatWorksInPlace:
    @pytest.mark.parametrize(
        "f", [lambda x, u: x.mul_(0.5).add_(u), lambda x, u: u + 0.5 * torch.relu_(x)], ids=["all of it", "a ReLU"]
    )
    @pytest.mark.parametrize("grad", [True, False])
    def test_is_refused(self, f, grad):
        with torch.set_grad_enabled(grad), pytest.raises(ArgumentError, match=r"expected f to leave its argument x"):
            fixed_point(f, torch.zeros(3, 4), torch.randn(3, 4))

    def test_is_refused_under_inference_mode_where_no_version_tells(self):
        with torch.inference_mode(), pytest.raises(ArgumentError, match=r"expected f to leave its argument x"):
            fixed_point(lambda x, u: x.mul_(0.5).add_(u), torch.randn(3, 4), torch.randn(3, 4))

    def test_may_do_so_on_what_it_made_itself(self):
        u = torch.randn(3, 4, requires_grad=True)
        solution = fixed_point(lambda x, u: (0.5 * x + u).relu_(), torch.zeros(3, 4), u)
        assert torch.allclose(solution.value, 2 * u.relu())


def test_a_map_that_returns_nothing_is_worded():
    with pytest.raises(ArgumentError, match=r"expected f to return a tensor, or a tuple of them, got \['NoneType'\]"):
        fixed_point(lambda x: None, torch.zeros(3, 4))


@pytest.mark.parametrize(("rate", "scale"), [(0.1, 1e6), (0.3, 1.0), (0.5, 1e-6)])
def test_anderson_is_not_slower_than_plain_iteration_on_easy_maps_of_any_scale(rate, scale):
    A = rate * torch.linalg.qr(torch.randn(50, 50))[0]
    b = scale * torch.randn(6, 50)

    def steps(solver):
        return fixed_point(lambda x, b: x @ A.t() + b, torch.zeros_like(b), b, solver=solver).steps

    assert (steps(Anderson()) <= steps(Picard())).all()


@every_solver
def test_a_singular_history_is_not_an_error(solver):
    # One number and several differences of it; two equal components; and a sample that does not move at all.
    one = fixed_point(lambda x, b: torch.cos(x) + b, torch.zeros(2, 1), torch.tensor([[0.0], [0.3]]), solver=solver)
    twins = fixed_point(lambda x, b: 0.9 * torch.cos(x) + b, torch.zeros(2, 6), torch.zeros(2, 6), solver=solver)
    still = fixed_point(
        lambda x, b: 0 * x + b, torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [2.0]]), solver=solver
    )
    assert one.converged.all()
    assert twins.converged.all()
    assert torch.allclose(still.value.flatten(), torch.tensor([1.0, 2.0]))


@every_solver
def test_two_steps_do_not_return_the_start(solver):
    few = replace(solver, max_steps=2)
    b = torch.randn(3, 4)
    solution = fixed_point(lambda x, b: 0.5 * torch.tanh(x) + b, torch.zeros(3, 4), b, solver=few, on_failure="ignore")
    assert (solution.steps == 2).all()
    assert (solution.residual < 1.0).all()
    assert not (solution.value == 0).all(dim=1).any()


@every_solver
def test_low_precision_works_on_the_cpu(solver):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        b = torch.randn(4, 8).to(dtype)
        solution = fixed_point(lambda x, b: torch.tanh(0.5 * x.flip(1) + b), torch.zeros_like(b), b, solver=solver)
        assert solution.converged.all(), dtype
        assert solution.value.dtype == dtype


@every_solver
def test_the_returned_iterate_is_the_one_that_was_tested(solver):
    A, b = 0.3 * torch.randn(5, 5), torch.randn(4, 5)

    def f(x, b):
        return torch.tanh(x @ A.t() + b)

    solution = fixed_point(f, torch.zeros(4, 5), b, solver=solver)
    fx = f(solution.value, b)
    measured = (fx - solution.value).norm(dim=1) / fx.norm(dim=1)
    assert torch.allclose(solution.residual, measured, rtol=1e-6, atol=digits(1e-15, 2e-7))


@every_solver
def test_the_tolerance_is_reached_in_float32_however_large_the_state(solver):
    b = 1e6 * torch.randn(4, 50, dtype=torch.float32)
    A = torch.randn(50, 50, dtype=torch.float32) / 100
    assert fixed_point(lambda x, b: torch.relu(x @ A.t() + b), torch.zeros_like(b), b, solver=solver).converged.all()


@pytest.mark.parametrize("solver", MONOTONE_SOLVERS, ids=repr)
def test_so_it_is_by_splitting(solver):
    b = 1e6 * torch.randn(4, 50, dtype=torch.float32)
    A = torch.randn(50, 50, dtype=torch.float32) / 100
    assert fixed_point(Equilibrium(A, b), torch.zeros_like(b), solver=solver).converged.all()


def test_newton_names_the_77_terabytes_of_a_dense_jacobian_instead_of_allocating_them():
    b = torch.zeros(1, 4_400_000, dtype=torch.float32)
    with pytest.raises(
        ArgumentError, match=r"at most 11585 numbers .* got 4400000, whose Jacobian takes 7.7e\+13 bytes"
    ):
        fixed_point(lambda x, b: x + b, b, b, solver=Newton(dense=True))
    assert fixed_point(lambda x, b: 0.1 * x + b, b, b + 1, solver=Newton()).converged.all()


@every_solver
def test_states_of_several_tensors_with_different_trailing_shapes(solver):
    def f(state, u):
        x, y = state
        return torch.tanh(0.3 * x + u[:, :, None]), 0.5 * y + x.sum(dim=(1, 2))[:, None]

    u = torch.randn(4, 2)
    x, y = fixed_point(f, (torch.zeros(4, 2, 3), torch.zeros(4, 1)), u, solver=solver).value
    fx, fy = f((x, y), u)
    assert torch.allclose(fx, x, atol=digits(1e-8, 1e-4))
    assert torch.allclose(fy, y, atol=digits(1e-8, 1e-4))


@every_solver
def test_shapes_may_change_from_call_to_call_and_have_any_number_of_dimensions(solver):
    for shape in [(3,), (2, 5), (4, 2, 3), (1, 2, 4, 4), (7, 5)]:
        b = torch.randn(shape)
        solution = fixed_point(lambda x, b: 0.5 * torch.cos(x) + b, torch.zeros(shape), b, solver=solver)
        assert solution.value.shape == shape
        assert solution.converged.all()


@pytest.mark.parametrize("solver", [Anderson(), Auto()], ids=repr)
def test_no_state_of_a_solver_survives_a_call(solver):
    b = torch.randn(3, 4)
    first, _, again = (
        fixed_point(lambda x, b: 0.9 * torch.cos(x) + b, torch.zeros_like(c), c, solver=solver) for c in (b, 5 * b, b)
    )
    assert torch.equal(first.value, again.value)
    assert torch.equal(first.steps, again.steps)
