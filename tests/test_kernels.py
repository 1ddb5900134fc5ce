"""The compiled loops against torch's operations: the same answers, honest figures, and nobody disturbed by a neighbour."""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import threading
import weakref
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from implicitdl import ArgumentError, Auto, Equilibrium, ImplicitAdjoint, ImplicitModel, Solution, fixed_point
from implicitdl.activations import COMPILED, IDENTITY, LEAKY_RELU, RELU, Activation
from implicitdl.constraints import RowScaling, Unconstrained
from implicitdl.equations.equilibrium import EquilibriumAdjoint
from implicitdl.equations.scaling import row_scale
from implicitdl.kernels import build, loops
from implicitdl.loop.iterate import iterate
from implicitdl.solvers import aitken
from kernel_paths import threads, torch_alone
from precision import digits

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(build.library(torch.float64) is None, reason="no C compiler"),
]

PHI = list(COMPILED)
RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}
BOTH = pytest.mark.parametrize("dtype", RTOL, ids=str)
by_name = pytest.mark.parametrize("phi", PHI, ids=lambda phi: phi.name)


def solve(f: Equilibrium, x0: Tensor | None = None, **settings: object) -> Solution:
    with torch.no_grad():
        return fixed_point(f, x0, solver=Auto(**settings), on_failure="ignore")


def residual_of(f: Equilibrium, x: Tensor, floor: float = 0.0) -> Tensor:
    """By torch, in double precision, of rows whose b is about 1; 0 where nothing changes, or x vanishes beside b."""
    fx = Equilibrium(f.A.double(), f.b.double(), f.activation)(x.double())
    change, size = (fx - x.double()).norm(dim=1), fx.norm(dim=1) + floor
    # Where f(x) is 0 and x is not, the residual is the largest number there is.
    return torch.where(change < 1e-20, 0.0, change / size).clamp(max=torch.finfo(torch.float32).max)


def close(residual: Tensor, true: Tensor, dtype: torch.dtype) -> bool:
    """Equal to rounding of f(x) − x, which is relative to f(x)."""
    return torch.allclose(residual.double(), true, rtol=1e-2, atol=200 * torch.finfo(dtype).eps)


def contraction(n: int, size: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """‖A‖∞ = size."""
    A = torch.randn(n, n, dtype=dtype)
    return size * A / A.abs().sum(dim=1).max()


def strided(x: Tensor) -> Tensor:
    """The same numbers, with others between them."""
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]


@dataclass(frozen=True)
class Drawn:
    f: Equilibrium
    x0: Tensor | None
    dtype: torch.dtype


@st.composite
def problems(draw: st.DrawFn, sizes: tuple[float, ...] = (0.3, 0.9, 0.99)) -> Drawn:
    n, batch = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    A = contraction(n, draw(st.sampled_from(sizes)), dtype)
    b, x0 = torch.randn(batch, n, dtype=dtype), torch.randn(batch, n, dtype=dtype)
    apart = draw(st.sampled_from([lambda x: x, strided, lambda x: x.t().contiguous().t()]))
    f = Equilibrium(apart(A), apart(b), draw(st.sampled_from(PHI)))
    return Drawn(f, draw(st.sampled_from([None, apart(x0)])), dtype)


class TestSolutions:
    @given(problems())
    def test_figures_are_those_of_the_returned_value(self, problem):
        f, rtol = problem.f, RTOL[problem.dtype]
        solution = solve(f, problem.x0)
        assert solution.converged.all()
        assert torch.equal(solution.converged, solution.residual <= rtol)
        assert close(solution.residual, residual_of(f, solution.value), problem.dtype)
        assert (solution.steps >= 1).all()
        assert (solution.steps < 300).all()

    @given(problems(sizes=(0.3, 0.8)))
    def test_the_solution_is_that_of_picard_at_double_precision(self, problem):
        f = Equilibrium(problem.f.A.double(), problem.f.b.double(), problem.f.activation)
        x = torch.zeros_like(f.b)
        for _ in range(180):  # 0.8 ** 180 is less than rounding
            x = f(x)
        found = solve(problem.f, problem.x0).value.double()
        # ‖x − x*‖∞ ≤ ‖f(x) − x‖∞ / (1 − ‖A‖∞), and rounding likewise.
        allowed = 5 * (RTOL[problem.dtype] + 20 * torch.finfo(problem.dtype).eps) * x.norm(dim=1)
        assert ((found - x).abs().amax(dim=1) <= allowed + 1e-20).all()

    @given(problems(sizes=(0.9, 1.5, 4.0)))
    def test_outside_the_ball_the_verdict_is_honest(self, problem):
        solution = solve(problem.f, problem.x0)
        assert torch.equal(solution.converged, solution.residual <= RTOL[problem.dtype])
        told = solution.residual[solution.converged]
        assert close(told, residual_of(problem.f, solution.value)[solution.converged], problem.dtype)

    @pytest.mark.float64
    @by_name
    def test_what_is_lost_reports_the_residual_of_what_is_returned(self, phi):
        for size, most in itertools.product((1.2, 2.0, 4.0), (2, 6, 18, 40)):
            f = Equilibrium(size * torch.linalg.qr(torch.randn(20, 20)).Q, torch.randn(8, 20), phi)
            compiled = solve(f, max_steps=most)
            with torch_alone():
                alone = solve(f, max_steps=most)
            for solution in (compiled, alone):
                true, told = residual_of(f, solution.value), solution.residual
                assert close(told[told < 1e30], true[told < 1e30], torch.float64), (size, most)

    @given(problems(), st.integers(1, 5))
    def test_few_steps(self, problem, most):
        solution = solve(problem.f, problem.x0, max_steps=most)
        assert (solution.steps <= most).all()
        assert (solution.steps >= 1).all()
        assert torch.equal(solution.converged, solution.residual <= RTOL[problem.dtype])
        assert close(solution.residual, residual_of(problem.f, solution.value), problem.dtype)

    @given(problems(), st.sampled_from([1e-3, 1.0]))
    def test_absolute_tolerance(self, problem, atol):
        rtol = RTOL[problem.dtype]
        solution = solve(problem.f, problem.x0, atol=atol)
        assert solution.converged.all()
        assert (solution.residual <= rtol).all()
        assert close(solution.residual, residual_of(problem.f, solution.value, atol / rtol), problem.dtype)

    @given(problems())
    def test_the_adjoint_is_that_of_a_dense_solve(self, problem):
        A, g = problem.f.A, problem.f.b
        slope = (torch.rand(g.shape, dtype=problem.dtype) > 0.5).to(problem.dtype)
        with torch.no_grad():
            outcome = iterate(EquilibriumAdjoint(A, slope, g, False), problem.x0, Auto())
        matrices = torch.eye(len(A), dtype=torch.float64) - A.double().t() * slope.double()[:, None, :]
        exact = torch.linalg.solve(matrices, g.double())
        # ‖v − v*‖ ≤ ‖(I − Jᵀ)⁻¹‖ ‖f(v) − v‖.
        amplified = 2 * RTOL[problem.dtype] * torch.linalg.matrix_norm(torch.linalg.inv(matrices), 2)
        assert outcome.stats.converged.all()
        error = (outcome.x.double() - exact).norm(dim=1) / exact.norm(dim=1)
        assert (error <= amplified).all()

    @by_name
    @BOTH
    def test_steps_are_about_those_of_torch(self, phi, dtype):
        f = Equilibrium(contraction(30, 0.9, dtype), torch.randn(20, 30, dtype=dtype), phi)
        compiled = solve(f)
        with torch_alone():
            alone = solve(f)
        assert alone.converged.all()
        # Looks of torch's loop are four sweeps apart; the compiled one looks at each.
        assert (compiled.steps <= alone.steps + 1).all()
        assert torch.allclose(compiled.value, alone.value, atol=20 * RTOL[dtype])

    def test_a_tolerance_below_rounding_is_missed_and_said_so(self):
        f = Equilibrium(contraction(33, 0.9), torch.randn(9, 33))
        solution = solve(f, rtol=1e-30, max_steps=50)
        assert torch.equal(solution.converged, solution.residual <= 1e-30)
        assert (solution.residual < 1e-14).all()
        assert (solution.steps <= 50).all()

    def test_the_solution_as_a_start_takes_one_evaluation(self):
        f = Equilibrium(contraction(33, 0.9), torch.randn(9, 33))
        x = solve(f, rtol=1e-13).value
        again = solve(f, x)
        assert (again.steps == 1).all()
        assert torch.equal(again.value, x)

    @by_name
    def test_no_start_is_f_of_zero(self, phi):
        f = Equilibrium(contraction(19, 0.9), torch.randn(9, 19), phi)
        without, given_ = solve(f), solve(f, f.after_zero())
        # The loop's φ(b) and torch's differ in the last digits.
        assert torch.allclose(without.value, given_.value, rtol=digits(1e-8, 1e-4), atol=digits(1e-8, 1e-4))
        assert int((without.steps - given_.steps).abs().max()) <= 1

    @BOTH
    def test_every_tail_of_a_vector(self, dtype):
        for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 64, 65, 200):
            f = Equilibrium(contraction(n, 0.9, dtype), torch.randn(5, n, dtype=dtype), LEAKY_RELU)
            solution = solve(f)
            assert solution.converged.all(), n
            assert close(solution.residual, residual_of(f, solution.value), dtype), n


class TestRowsAlone:
    @given(problems(sizes=(0.9, 0.99)))
    def test_a_row_does_not_know_its_batch_nor_the_threads(self, problem):
        f, x0 = problem.f, problem.x0
        with threads(1):
            whole = solve(f, x0)
        with threads(2):
            shared = solve(f, x0)
        last = len(f.b) - 1
        alone = solve(Equilibrium(f.A, f.b[last:], f.activation), None if x0 is None else x0[last:])
        for name in ("value", "steps", "residual"):
            assert torch.equal(getattr(whole, name), getattr(shared, name))
            assert torch.equal(getattr(whole, name)[last:], getattr(alone, name))

    @pytest.mark.float64
    @by_name
    def test_a_strange_row_disturbs_nobody(self, phi):
        A, b = contraction(21, 0.9), torch.randn(40, 21)
        clean, others = solve(Equilibrium(A, b, phi)), torch.arange(40) != 17
        for bad in (torch.nan, torch.inf, -torch.inf, 1e300, 1e-300, 5e-324, 0.0):
            strange = b.clone()
            strange[17] = bad
            solution = solve(Equilibrium(A, strange, phi))
            for name in ("value", "steps", "residual"):
                assert torch.equal(getattr(solution, name)[others], getattr(clean, name)[others]), (name, bad)
            with torch_alone():
                alone = solve(Equilibrium(A, strange, phi))
            assert solution.converged[others].all(), bad
            found = solution.converged & alone.converged
            assert torch.allclose(solution.value[found], alone.value[found], rtol=1e-6, atol=0.0), bad

    @by_name
    def test_a_strange_row_in_single_precision(self, phi):
        A, b = contraction(21, 0.9, torch.float32), torch.randn(40, 21, dtype=torch.float32)
        for bad in (torch.nan, 1e30, 1e-40, 1e-45):
            b[17] = bad
            solution = solve(Equilibrium(A, b, phi))
            with torch_alone():
                alone = solve(Equilibrium(A, b, phi))
            assert solution.converged[torch.arange(40) != 17].all(), bad
            found = solution.converged & alone.converged
            # Relative to the row, whatever its size.
            size = alone.value[found].abs().amax(dim=1, keepdim=True)
            assert ((solution.value[found] - alone.value[found]).abs() <= 3e-4 * size + 1e-44).all(), bad

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_weights_that_are_not_finite_solve_nothing(self, bad):
        A = contraction(10, 0.9)
        A[3, 4] = bad
        with pytest.raises(ArgumentError, match="expected finite A"):
            solve(Equilibrium(A, torch.randn(3, 10).abs() + 1, RELU))

    def test_a_start_that_is_not_finite_loses_its_row_only(self):
        A, b, x0 = contraction(10, 0.9), torch.randn(3, 10), torch.randn(3, 10)
        x0[1, 5] = torch.nan
        assert solve(Equilibrium(A, b, IDENTITY), x0).converged.tolist() == [True, False, True]

    def test_zero_rows_are_done_at_once(self):
        b = torch.randn(7, 10)
        b[2], b[5] = 0.0, -1.0
        solution = solve(Equilibrium(contraction(10, 0.9), b, RELU))
        zero = torch.tensor([2, 5])
        assert (solution.steps[zero] == 1).all()
        assert (solution.residual[zero] == 0).all()
        assert (solution.value[zero] == 0).all()
        assert solution.converged.all()

    @pytest.mark.parametrize("size", [1e-38, 1e-42, 1e-20, 1e20, 1e30])
    def test_cotangents_of_any_size(self, size):
        A = contraction(12, 0.9, torch.float32).requires_grad_()
        b = torch.randn(4, 12, dtype=torch.float32, requires_grad=True)
        g = torch.randn(4, 12, dtype=torch.float32)
        g[1] = 0.0
        x = fixed_point(Equilibrium(A, b, IDENTITY), None).value
        (gradient,) = torch.autograd.grad(x, b, size * g)
        exact = torch.linalg.solve(torch.eye(12) - A.detach().double().t(), (size * g).double().t()).t()
        assert (gradient[1] == 0).all()
        assert torch.allclose(gradient.double(), exact, rtol=1e-3, atol=1e-4 * size + 1e-44)


class TestHardRows:
    @pytest.mark.parametrize("f", [
        Equilibrium(torch.eye(3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64), IDENTITY),
        Equilibrium(2.0 * torch.eye(3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64), RELU),
        Equilibrium(torch.full((3, 3), 9.0, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64), LEAKY_RELU),
    ], ids=["x + 1", "2x + 1", "27x + 1"])  # fmt: skip
    @pytest.mark.parametrize("rtol", [1e-10, 1e-2])
    def test_what_has_no_solution_is_not_found(self, f, rtol):
        solution = solve(f, rtol=rtol)
        with torch_alone():
            alone = solve(f, rtol=rtol)
        assert torch.equal(solution.converged, alone.converged)
        assert torch.equal(solution.converged, solution.residual <= rtol)

    @pytest.mark.float64
    @pytest.mark.parametrize("radius", [0.99, 0.999, 0.9999])
    def test_slow_rows_are_left_to_the_next_stage(self, radius):
        Q = torch.linalg.qr(torch.randn(20, 20)).Q
        A = Q @ torch.diag(torch.linspace(-radius, radius, 20)) @ Q.t()
        b = torch.randn(6, 20)
        solution = solve(Equilibrium(A, b, IDENTITY))
        assert solution.converged.all()
        assert (solution.steps <= 300).all()
        assert close(solution.residual, residual_of(Equilibrium(A, b, IDENTITY), solution.value), torch.float64)
        exact = torch.linalg.solve(torch.eye(20) - A, b.t()).t()
        assert torch.allclose(solution.value, exact, rtol=1e-5, atol=1e-4)

    @pytest.mark.float64
    @pytest.mark.parametrize("radius", [0.9, 0.99, 1.0])
    def test_rotations(self, radius):
        turn = radius * torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]])] * 5)
        b = torch.randn(6, 10)
        solution = solve(Equilibrium(turn, b, IDENTITY))
        exact = torch.linalg.solve(torch.eye(10) - turn, b.t()).t()
        assert solution.converged.all()
        assert torch.allclose(solution.value, exact, atol=1e-7)

    def test_easy_rows_beside_slow_ones_stay_what_they_are(self):
        easy, slow = contraction(8, 0.3), 0.999 * torch.linalg.qr(torch.randn(8, 8)).Q
        A = torch.block_diag(easy, slow)
        b = torch.randn(9, 16)
        b[::2, 8:] = 0.0
        both, alone = solve(Equilibrium(A, b, IDENTITY)), solve(Equilibrium(A, b[::2], IDENTITY))
        assert both.converged.all()
        assert torch.equal(both.value[::2], alone.value)
        assert torch.equal(both.steps[::2], alone.steps)
        assert (both.steps[1::2] > both.steps[::2].max()).all()

    def test_easy_cotangents_beside_slow_ones_stay_what_they_are(self):
        easy, slow = contraction(8, 0.3), 0.999 * torch.linalg.qr(torch.randn(8, 8)).Q
        A, b = torch.block_diag(easy, slow), torch.randn(9, 16, requires_grad=True)
        x = fixed_point(Equilibrium(A, b, IDENTITY), None).value
        g = torch.randn(9, 16)
        g[::2, 8:] = 0.0
        alone = b.detach()[::2].requires_grad_()
        easy_x = fixed_point(Equilibrium(A, alone, IDENTITY), x.detach()[::2]).value
        (both,), (expected,) = torch.autograd.grad(x, b, g), torch.autograd.grad(easy_x, alone, g[::2])
        assert torch.equal(both[::2], expected)

    @pytest.mark.float64
    def test_slow_cotangents(self):
        A = (0.999 * torch.linalg.qr(torch.randn(10, 10)).Q).requires_grad_()
        b = torch.randn(3, 10, requires_grad=True)
        solution = fixed_point(Equilibrium(A, b, IDENTITY), None)
        g = torch.randn(3, 10)
        (gradient,) = torch.autograd.grad(solution.value, b, g)
        exact = torch.linalg.solve(torch.eye(10) - A.detach().t(), g.t()).t()
        assert solution.backward.converged.all()
        assert torch.allclose(gradient, exact, atol=1e-6)


def value(A: Tensor, b: Tensor, phi: Activation = LEAKY_RELU, order: int = 1, x0: Tensor | None = None) -> Tensor:
    exact = Auto(rtol=1e-13)
    return fixed_point(
        Equilibrium(A, b, phi), x0, solver=exact, adjoint=ImplicitAdjoint(order=order, solver=exact)
    ).value


class TestGradients:
    def tensors(self) -> tuple[Tensor, Tensor]:
        return contraction(6, 0.8).requires_grad_(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    @by_name
    def test_gradcheck(self, phi):
        assert gradcheck(lambda A, b: value(A, b, phi), self.tensors(), fast_mode=True)

    @pytest.mark.parametrize("x0", [None, torch.ones(4, 6, dtype=torch.float64)], ids=["none", "given"])
    def test_batched_gradcheck(self, x0):
        assert gradcheck(lambda A, b: value(A, b, x0=x0), self.tensors(), check_batched_grad=True, fast_mode=True)

    @by_name
    def test_second_order(self, phi):
        assert gradgradcheck(lambda A, b: value(A, b, phi, order=2), self.tensors(), fast_mode=True)

    def test_first_order_is_right_under_create_graph_and_refuses_a_second(self):
        A, b = self.tensors()
        plain = torch.autograd.grad(value(A, b).sum(), (A, b))
        graph = torch.autograd.grad(value(A, b).sum(), (A, b), create_graph=True)
        assert all(torch.allclose(p, g, atol=1e-12) for p, g in zip(plain, graph, strict=True))
        for gradient in graph:
            with pytest.raises(RuntimeError, match="order"):
                torch.autograd.grad(gradient.sum(), A, retain_graph=True)

    @pytest.mark.parametrize("which", [0, 1])
    def test_one_of_the_two_frozen(self, which):
        A, b = self.tensors()
        both = torch.autograd.grad(value(A, b).pow(2).sum(), (A, b))[which]
        held = [A.detach(), b.detach()]
        held[which].requires_grad_()
        assert torch.equal(torch.autograd.grad(value(*held).pow(2).sum(), held[which])[0], both)

    @pytest.mark.parametrize("which", ["A", "b"])
    def test_a_change_in_place_before_backward_is_an_error(self, which):
        leaves = self.tensors()
        A, b = (leaf * 1.0 for leaf in leaves)
        x = value(A, b)
        with torch.no_grad():
            {"A": A, "b": b}[which].mul_(2.0)
        with pytest.raises(RuntimeError, match="inplace operation"):
            x.sum().backward()

    def test_backward_twice(self):
        A, b = self.tensors()
        loss = value(A, b).pow(2).sum()
        first = torch.autograd.grad(loss, (A, b), retain_graph=True)
        second = torch.autograd.grad(loss, (A, b))
        assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, (A, b))

    def test_a_graph_that_is_not_used_leaves_nothing_alive(self):
        x = value(*self.tensors())
        held = weakref.ref(x.grad_fn.at)
        del x
        gc.collect()
        assert held() is None

    @pytest.mark.parametrize("vectorize", [False, True])
    def test_jacobian_of_a_model(self, vectorize):
        model = ImplicitModel(3, 2, 9, tol=1e-12, grad_tol=1e-12)
        u = torch.randn(1, 3)
        found = torch.autograd.functional.jacobian(model, u, vectorize=vectorize)
        with torch_alone():
            alone = torch.autograd.functional.jacobian(model, u)
        assert torch.allclose(found, alone, atol=1e-9)

    @pytest.mark.float64
    @pytest.mark.parametrize("outside", [1e-3, 100.0])
    def test_model_gradients_are_those_of_torch_alone(self, outside):
        model = ImplicitModel(5, 3, 17, tol=1e-12, grad_tol=1e-12, bias=True)
        with torch.no_grad():
            model.A.mul_(outside)
        u = torch.randn(11, 5)
        found = torch.autograd.grad(model(u).pow(2).sum(), list(model.parameters()))
        with torch_alone():
            alone = torch.autograd.grad(model(u).pow(2).sum(), list(model.parameters()))
        assert all(torch.allclose(f, a, rtol=1e-7, atol=1e-9) for f, a in zip(found, alone, strict=True))

    def test_parameters_without_a_constraint(self):
        model = ImplicitModel(3, 2, 9, constraint=Unconstrained)
        model(torch.randn(4, 3)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_torch_func_goes_its_own_way(self):
        A, b = (t.detach() for t in self.tensors())
        total = lambda A, b: value(A, b).pow(2).sum()  # noqa: E731
        expected = torch.autograd.grad(total(A.requires_grad_(), b), A)[0]
        A = A.detach()
        assert torch.allclose(torch.func.grad(total)(A, b), expected, atol=1e-9)
        each = torch.func.vmap(lambda row: value(A, row[None])[0])(b)
        assert torch.allclose(each, value(A, b), atol=1e-9)
        _, tangent = torch.func.jvp(lambda A: total(A, b), (A,), (torch.ones_like(A),))
        assert torch.allclose(tangent, expected.sum(), atol=1e-8)

    def test_autocast(self):
        model = ImplicitModel(5, 3, 17, dtype=torch.float32)
        u = torch.randn(4, 5, dtype=torch.float32)
        exact = model(u)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(u)
        y.float().sum().backward()
        assert torch.allclose(y.float(), exact, atol=0.05)
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestFigures:
    """They are made tensors of when somebody looks."""

    def solved(self) -> Solution:
        torch.manual_seed(1)
        solution = fixed_point(Equilibrium(contraction(6, 0.8).requires_grad_(), torch.randn(4, 6)), None)
        solution.value.sum().backward()
        return solution

    def test_are_kept_and_the_users_own(self):
        solution = self.solved()
        assert solution.steps is solution.steps
        solution.residual.add_(1)
        assert (solution.residual >= 1).all()
        assert solution.converged.tolist() == [True] * 4

    def test_show_themselves(self):
        with torch_alone():
            plain = repr(self.solved())
        compiled = repr(self.solved())
        for text in (plain, compiled):
            names = re.findall(r"(\w+)=", text.split("backward=")[1])
            assert names == ["residual", "steps", "converged", "trace"]
            assert text.startswith("Solution(value=tensor(")
            assert "Measured" not in text
            assert "Swept" not in text

    def test_survive_a_copy_and_a_pickle(self):
        report = self.solved().report()
        for other in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
            for one, same in ((report, other), (report.backward, other.backward)):
                assert torch.equal(one.residual, same.residual)
                assert torch.equal(one.steps, same.steps)
                assert torch.equal(one.converged, same.converged)
        other.residual.zero_()
        assert (report.residual > 0).any()


class TestForeignTensors:
    """What looks like numbers in memory, and is something else."""

    def setup_method(self) -> None:
        self.A, self.b = contraction(5, 0.8), torch.randn(3, 5, dtype=torch.float64)
        self.x = solve(Equilibrium(self.A, self.b, IDENTITY)).value

    @pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
    def test_sparse_weights(self):
        f = Equilibrium(self.A.to_sparse_csr(), self.b, IDENTITY)
        assert torch.allclose(solve(f).value, self.x)

    def test_a_sign_that_is_not_in_memory(self):
        negative = torch.complex(self.A, -self.A).conj().imag
        assert negative.is_neg()
        assert torch.allclose(solve(Equilibrium(negative, self.b, IDENTITY)).value, self.x)
        # Twice as large as the ball, and of the other sign.
        assert torch.allclose(RowScaling(kappa=0.4)(negative), RowScaling(kappa=0.4)(self.A))

    def test_another_default_device(self):
        with torch.device("meta"):
            solution = solve(Equilibrium(self.A, self.b, IDENTITY))
        assert torch.equal(solution.value, self.x)
        assert solution.residual.device.type == "cpu"

    def test_a_subclass_is_left_to_torch(self):
        class Listening(Tensor):
            pass

        f = Equilibrium(self.A.as_subclass(Listening), self.b, IDENTITY)
        assert isinstance(solve(f).value, Listening)
        assert torch.allclose(solve(f).value.as_subclass(Tensor), self.x)

    def test_a_recorder_sees_what_is_done(self):
        recorded = make_fx(lambda b: solve(Equilibrium(self.A, b, IDENTITY)).value)(self.b)
        assert torch.allclose(recorded(self.b), self.x)

    @pytest.mark.parametrize("b", [torch.ones(0, 5), torch.ones(5), torch.ones(2, 5, dtype=torch.int64)], ids=str)
    def test_rows_that_cannot_be_are_an_error(self, b):
        with pytest.raises(ArgumentError, match="b of floating-point rows"):
            fixed_point(Equilibrium(torch.ones(5, 5), b), None)

    def test_a_start_of_another_shape_is_torchs_to_judge(self):
        with pytest.raises(RuntimeError):
            solve(Equilibrium(self.A, self.b), torch.ones(3, 4))


class TestThreadsAndProcesses:
    def test_many_python_threads(self):
        f = Equilibrium(contraction(60, 0.95), torch.randn(50, 60))
        expected, found = solve(f).value, [None] * 8

        def work(i: int) -> None:
            found[i] = all(torch.equal(solve(f).value, expected) for _ in range(20))

        workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(found)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_child_does_not_wait_for_its_parents_threads(self):
        f = Equilibrium(contraction(30, 0.9), torch.randn(64, 30))
        with threads(2):
            solve(f)
            child = multiprocessing.get_context("fork").Process(target=solve, args=(f,))
            child.start()
            child.join(20)
        alive = child.is_alive()
        child.kill()
        assert not alive
        assert child.exitcode == 0

    def test_memory_that_is_not_there_leaves_the_work_to_torch(self):
        f = Equilibrium(contraction(5, 0.8), torch.randn(3, 5))
        with mock.patch.object(
            loops, "loops", return_value=mock.Mock(wraps=loops.loops(torch.get_default_dtype()), solve=lambda _: -1)
        ):
            assert torch.allclose(solve(f).value, solve(f).value)
            assert solve(f).converged.all()


def layouts(v: Tensor) -> list[Tensor]:
    return [v, strided(v), v.t().contiguous().t()]


class TestRowScaling:
    @given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 999))
    def test_forward_and_backward_are_autograds(self, m, n, dtype, seed):
        torch.manual_seed(seed)
        v = torch.randn(m, n, dtype=dtype) * torch.rand(m, 1, dtype=dtype) / n**0.5
        v[torch.rand(m, n) < 0.1] = 0.0
        g, constraint = torch.randn(m, n, dtype=dtype), RowScaling(kappa=0.5)
        plain = v.clone().requires_grad_()
        (expected,) = torch.autograd.grad(plain * row_scale(plain, 0.5), plain, g)
        eps = torch.finfo(dtype).eps
        for given_ in layouts(v):
            raw = given_.detach().requires_grad_()
            A = constraint(raw)
            (gradient,) = torch.autograd.grad(A, raw, strided(g))
            assert torch.allclose(A, v * row_scale(v, 0.5), rtol=100 * eps, atol=eps)
            assert torch.allclose(gradient, expected, rtol=1e3 * eps, atol=1e3 * eps)
            assert (A.abs().sum(dim=1) <= 0.5 * (1 + 100 * eps)).all()

    def test_rows_that_are_special(self):
        v = torch.tensor([
            [0.25, -0.25, 0.0],  # on the sphere, which counts as inside
            [0.0, 0.0, 0.0],
            [0.1, 0.2, 0.0],
            [1.0, 0.0, -3.0],
            [torch.nan, 1.0, 0.0],
        ])  # fmt: skip
        raw = v.clone().requires_grad_()
        A = RowScaling(kappa=0.5)(raw)
        g = torch.randn(5, 3)
        (gradient,) = torch.autograd.grad(A, raw, g)
        assert torch.equal(A[:3], v[:3])
        assert torch.equal(gradient[:3], g[:3])
        assert torch.allclose(A[3], torch.tensor([0.125, 0.0, -0.375]))
        assert A[4].isnan().all()
        plain = v[3:4].clone().requires_grad_()
        assert torch.allclose(gradient[3:4], torch.autograd.grad(plain * row_scale(plain, 0.5), plain, g[3:4])[0])

    def test_second_derivatives(self):
        raw = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        assert gradgradcheck(RowScaling(kappa=0.5), raw, fast_mode=True)

    def test_many_cotangents_and_dual_ones(self):
        raw = torch.randn(4, 5).requires_grad_()
        A, G = RowScaling(kappa=0.5)(raw), torch.randn(3, 4, 5)
        pull = lambda g, **options: torch.autograd.grad(A, raw, g, retain_graph=True, **options)[0]  # noqa: E731
        one_by_one = torch.stack([pull(g) for g in G])
        assert torch.allclose(torch.func.vmap(pull)(G), one_by_one)
        assert torch.allclose(pull(G, is_grads_batched=True), one_by_one)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(pull(forward_ad.make_dual(G[0], G[1]))).tangent
        assert torch.allclose(tangent, one_by_one[1])

    @BOTH
    def test_all_finite(self, dtype):
        for count in (1, 7, 8, 16, 17, 100):
            x = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
            assert loops.all_finite(x)
            for place, bad in itertools.product((0, count // 2, count - 1), (torch.nan, torch.inf, -torch.inf)):
                wrong = x.clone()
                wrong[place] = bad
                assert not loops.all_finite(wrong), (count, place, bad)


class TestNorms:
    @given(m=st.integers(1, 9), n=st.integers(1, 70) | st.sampled_from([511, 512, 513, 1024, 5000]), two=st.booleans())
    def test_are_torchs(self, m, n, two):
        dtype = [torch.float64, torch.float32][two]
        x, fx = torch.randn(m, n, dtype=dtype), torch.randn(m, n, dtype=dtype)
        change, size = loops.norms(x, fx)
        assert change.dtype == size.dtype == dtype
        tolerance = 100 * torch.finfo(dtype).eps
        assert torch.allclose(change, torch.linalg.vector_norm(fx - x, dim=1), rtol=tolerance)
        assert torch.allclose(size, torch.linalg.vector_norm(fx, dim=1), rtol=tolerance)

    def test_a_row_that_is_not_finite_is_the_only_one(self):
        fx = torch.ones(3, 40)
        fx[1, 17], fx[2, 39] = torch.nan, torch.inf
        change, size = loops.norms(torch.zeros(3, 40), fx)
        assert torch.isfinite(change).tolist() == torch.isfinite(size).tolist() == [True, False, False]

    @given(m=st.integers(1, 9), n=st.integers(1, 70) | st.sampled_from([511, 512, 513, 1024, 5000]), two=st.booleans())
    def test_the_aitken_step_is_torchs(self, m, n, two):
        x, fx, before = torch.randn(3, m, n, dtype=[torch.float64, torch.float32][two])
        with torch.no_grad():
            compiled = aitken._extrapolate(x, fx, before)
            with torch_alone():
                plain = aitken._extrapolate(x, fx, before)
        # γ is a ratio of sums of either sign.
        assert torch.allclose(compiled, plain, rtol=1e-3, atol=1e4 * torch.finfo(x.dtype).eps)

    @pytest.mark.float64
    @pytest.mark.parametrize("size", [1e-200, 1e200, torch.inf, torch.nan])
    def test_an_aitken_step_of_products_that_say_nothing_is_plain(self, size):
        x, fx, before = torch.zeros(2, 20), torch.ones(2, 20), torch.full((2, 20), 2.0)
        fx[1] = size
        with torch.no_grad():
            found = aitken._extrapolate(x, fx, before)
        assert torch.equal(found[0], torch.full((20,), 2.0))  # r = 1, d = −1, γ = −1
        with torch.no_grad(), torch_alone():
            assert torch.equal(found.nan_to_num(), aitken._extrapolate(x, fx, before).nan_to_num())

    def test_numbers_that_do_not_lie_together_are_left_to_torch(self):
        ones = torch.ones(2, 3, dtype=torch.float64)
        assert loops.norms(strided(ones), ones) is None
        assert loops.norms(ones, ones.float()) is None
