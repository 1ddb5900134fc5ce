"""Broyden, Newton, GMRES and operator splitting: what each claims beyond the zoo."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import implicitdl.solvers.newton as newton_module
from implicitdl import (
    GMRES,
    Anderson,
    ArgumentError,
    Auto,
    Broyden,
    Equilibrium,
    ForwardBackward,
    ImplicitAdjoint,
    LowRankEquilibrium,
    Newton,
    PeacemanRachford,
    Picard,
    Unrolled,
    fixed_point,
)
from implicitdl.activations import BUILTIN, IDENTITY, LEAKY_RELU, RELU, TANH
from implicitdl.loop.iterate import iterate
from implicitdl.solvers.base import Solver
from implicitdl.testing import MONOTONE_SOLVERS, SOLVERS
from precision import digits


class Counted:
    """A function that counts its calls."""

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, *args):
        self.calls += 1
        return self.f(*args)


def affine(A):
    return lambda x, b: x @ A.t() + b


def steps(f, b, solver):
    return fixed_point(f, torch.zeros_like(b), b, solver=solver, on_failure="raise").steps


def monotone(n, m=0.1, size=1.0):
    P, Q = size * torch.randn(2, n, n) / n**0.5
    return (1 - m) * torch.eye(n) - P.t() @ P + Q - Q.t()


class TestBroyden:
    def states(self, memory, count, line_search=False):
        """The method's own state after some steps on a map that is not affine, and the points it went through."""
        f = Equilibrium(0.8 * torch.linalg.qr(torch.randn(7, 7))[0], torch.randn(3, 7), TANH)
        solver = Broyden(memory=memory, line_search=line_search)
        x = torch.zeros(3, 7)
        state = solver.init(f, x)
        points = []
        for _ in range(count):
            fx = f(x)
            points.append((x, fx - x))
            x, state, _ = solver.step(f, x, fx, state)
        return solver.inverse(state), points

    @pytest.mark.parametrize(("memory", "count"), [(5, 1), (5, 4), (5, 6), (4, 11), (1, 5)])
    def test_the_compact_form_is_the_sequence_of_the_last_updates(self, memory, count):
        inverse, points = self.states(memory, count)
        for sample in range(3):
            B = torch.eye(7)
            for (x, r), (x_next, r_next) in list(itertools.pairwise(points))[-memory:]:
                s, y = (x_next - x)[sample], (r - r_next)[sample]
                B = B + torch.outer(y - B @ s, s) / (s @ s)
            H = torch.linalg.inv(B)
            g = torch.randn(7)
            assert torch.allclose(inverse.apply(g.expand(3, 7))[sample], H @ g)
            assert torch.allclose(inverse.transpose_apply(g.expand(3, 7))[sample], H.t() @ g)

    def test_the_loop_hands_out_the_inverse_of_every_sample_as_if_it_were_alone(self):
        A = 0.9 * torch.linalg.qr(torch.randn(6, 6))[0]
        b = torch.tensor([0.01, 0.3, 1.0, 3.0])[:, None] * torch.randn(4, 6)
        f = Equilibrium(A, b, TANH)
        together = iterate(f, torch.zeros(4, 6), Broyden(), keep_inverse=True)
        assert len(set(together.stats.steps.tolist())) > 1, "every sample finished at once"
        g = torch.randn(4, 6)
        estimate = together.inverse.transpose_apply(g)
        for i in range(4):
            alone = iterate(f.take(torch.tensor([i])), torch.zeros(1, 6), Broyden(), keep_inverse=True)
            assert torch.allclose(alone.inverse.transpose_apply(g[i : i + 1])[0], estimate[i])

    def test_an_inverse_is_kept_only_where_it_is_asked_for_and_exists(self):
        f = Equilibrium(torch.zeros(2, 2), torch.ones(1, 2))
        assert iterate(f, torch.zeros(1, 2), Broyden()).inverse is None
        assert iterate(f, torch.zeros(1, 2), Picard(), keep_inverse=True).inverse is None

    def test_samples_that_never_reach_broyden_have_the_identity(self):
        turn = 0.95 * torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        A, b = torch.block_diag(torch.zeros(1, 1), turn), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        f = Equilibrium(A, b, IDENTITY)
        inverse = iterate(f, torch.zeros(2, 3), Auto(slow=Broyden()), keep_inverse=True).inverse
        assert torch.equal(inverse.apply(b)[0], b[0])
        # The other has learned the plane that it turned in.
        assert torch.allclose(inverse.apply(b)[1], torch.linalg.solve(torch.eye(3) - A, b[1]), atol=1e-4)

    @pytest.mark.parametrize("line_search", [False, True])
    def test_every_evaluation_is_counted(self, line_search):
        f = Counted(lambda x, b: torch.tanh(3 * x) + b)
        b = torch.tensor([[0.3]])
        with torch.no_grad():
            solution = fixed_point(
                f, torch.zeros(1, 1), b, solver=Broyden(line_search=line_search), on_failure="ignore"
            )
        assert int(solution.steps) == f.calls

    def test_the_line_search_solves_what_plain_steps_do_not(self):
        b = torch.randn(4, 10)
        f = affine(torch.diag(torch.linspace(-4.0, 3.7, 10)))
        plain = fixed_point(f, torch.zeros(4, 10), b, solver=Broyden(line_search=False), on_failure="ignore")
        searched = fixed_point(f, torch.zeros(4, 10), b, solver=Broyden(memory=40))
        assert not plain.converged.all()  # rounding decides how a path far from normal ends
        assert searched.converged.all()

    def test_a_slow_nonnegative_map_takes_a_twentieth_of_the_plain_steps(self):
        A = torch.rand(50, 50)
        f, b = affine(0.99 * A / A.sum(dim=1, keepdim=True)), torch.rand(4, 50)
        assert steps(f, b, Broyden()).max() * 20 < steps(f, b, Picard(max_steps=5000)).min()


class TestNewton:
    @pytest.mark.float64
    def test_the_tutorials_tanh_layer_takes_six_steps_at_most_where_plain_iteration_takes_tens(self):
        W = nn.Linear(50, 50, bias=False).weight.detach() * 2
        b = torch.randn(10, 50)
        zero = torch.zeros_like(b)
        closure = lambda x, b: torch.tanh(x @ W.t() + b)  # noqa: E731
        plain = fixed_point(closure, zero, b, solver=Picard(rtol=1e-4))
        newton = fixed_point(closure, zero, b, solver=Newton(rtol=1e-4))
        closed_form = fixed_point(Equilibrium(W, b, TANH), zero, solver=Newton(rtol=1e-4))
        assert plain.steps.double().mean() > 20
        assert newton.steps.max() <= 6
        assert torch.allclose(closed_form.value, newton.value, atol=1e-12)
        assert torch.equal(closed_form.steps, newton.steps)

    @pytest.mark.parametrize("dense", [True, False])
    def test_every_evaluation_is_counted(self, dense):
        f = Counted(lambda x, b: torch.tanh(2 * x) + b)
        with torch.no_grad():
            solution = fixed_point(f, torch.zeros(1, 1), torch.tensor([[0.3]]), solver=Newton(dense=dense))
        assert int(solution.steps) == f.calls

    @pytest.mark.float64
    @given(seed=st.integers(0, 10_000), n=st.integers(1, 40), kappa=st.floats(0.1, 0.97))
    def test_on_relu_models_it_ends_after_few_steps_at_the_exact_solution(self, seed, n, kappa):
        torch.manual_seed(seed)
        A = torch.randn(n, n)
        f = Equilibrium(kappa * A / A.abs().sum(dim=1, keepdim=True), torch.randn(5, n))
        solution = fixed_point(f, torch.zeros(5, n), solver=Newton())
        assert solution.steps.max() <= 8
        assert solution.residual.max() < 1e-13

    @pytest.mark.float64
    @given(seed=st.integers(0, 10_000), n=st.integers(1, 30))
    def test_monotone_models_of_any_size_of_a(self, seed, n):
        torch.manual_seed(seed)
        f = Equilibrium(monotone(n, size=2.0), torch.randn(5, n))
        assert fixed_point(f, torch.zeros(5, n), solver=Newton()).residual.max() < 1e-12

    @pytest.mark.float64
    def test_nonnegative_and_cyclic_relu_models(self):
        positive = torch.rand(40, 40)
        for A in (0.99 * positive / positive.sum(dim=1, keepdim=True), 0.99 * torch.eye(40).roll(1, 0)):
            solution = fixed_point(Equilibrium(A, torch.randn(6, 40)), torch.zeros(6, 40), solver=Newton())
            assert solution.residual.max() < 1e-12

    def test_a_step_that_overshoots_is_halved(self):
        # Full Newton steps on arctan diverge from every start beyond 1.39.
        x0 = torch.tensor([[3.0], [30.0], [0.5]])
        solution = fixed_point(lambda x, _: x - torch.atan(x), x0, torch.zeros(3, 1), solver=Newton(atol=1e-12))
        assert solution.converged.all()
        assert solution.value.abs().max() < 1e-10
        assert solution.steps.max() < 20

    def test_dense_and_matrix_free_agree(self):
        A, b = monotone(40, m=0.5), torch.randn(4, 40)
        dense, free = (
            fixed_point(Equilibrium(A, b, TANH), torch.zeros(4, 40), solver=Newton(dense=d)).value
            for d in (True, False)
        )
        assert torch.allclose(dense, free, atol=digits(1e-8, 1e-3))

    def test_a_large_state_is_solved_without_a_jacobian(self):
        b = torch.randn(2, 3000)
        f = Counted(lambda x, b: torch.tanh(0.9 * x.roll(1, 1) + b))
        solution = fixed_point(f, torch.zeros_like(b), b, solver=Newton())
        assert solution.converged.all()
        assert f.calls < 100

    def test_jacobians_are_factorised_a_few_at_a_time(self, monkeypatch):
        f = Equilibrium(monotone(6, m=0.5), torch.randn(9, 6))
        whole = fixed_point(f, torch.zeros(9, 6), solver=Newton())
        monkeypatch.setattr(newton_module, "_AT_ONCE", 2 * 6 * 6)
        parts = fixed_point(f, torch.zeros(9, 6), solver=Newton())
        assert torch.equal(whole.steps, parts.steps)
        assert torch.allclose(whole.value, parts.value, rtol=1e-12)

    def test_samples_that_leave_the_batch_keep_their_jacobians(self):
        # Three of four samples are solved at once, so the batch shrinks between an evaluation and the step after it.
        A, b = 0.9 * torch.linalg.qr(torch.randn(5, 5))[0], torch.randn(4, 5)
        x0 = fixed_point(Equilibrium(A, b, TANH), torch.zeros(4, 5)).value.clone()
        x0[2] = 0
        for f, args in ((Equilibrium(A, b, TANH), ()), (lambda x, b: torch.tanh(x @ A.t() + b), (b,))):
            solution = fixed_point(f, x0, *args, solver=Newton())
            assert solution.steps.tolist()[:2] == [1, 1]
            assert 1 < solution.steps[2] <= 6
            assert solution.converged.all()

    def test_a_singular_jacobian_takes_the_plain_step(self):
        # I − J = 0 at the start: f(x) = x + (1 − x)² has slope 1 at 1 only through the factor below.
        solution = fixed_point(lambda x, b: x + b - x**3, torch.zeros(1, 1), torch.tensor([[0.5]]), solver=Newton())
        assert torch.allclose(solution.value, torch.tensor([[0.5]]) ** (1 / 3))

    def test_a_low_rank_model(self):
        L, R = 0.3 * torch.randn(2, 12, 3)
        f = LowRankEquilibrium(L, R, torch.randn(4, 12), TANH)
        exact = fixed_point(Equilibrium(L @ R.t(), f.b, TANH), torch.zeros(4, 12)).value
        solution = fixed_point(f, torch.zeros(4, 12), solver=Newton())
        assert torch.allclose(solution.value, exact, atol=digits(1e-9, 1e-4))
        assert solution.steps.max() <= 7

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_every_grad_mode(self, mode):
        with mode():
            b = torch.randn(3, 4)
            for f, args in (
                (lambda x, b: torch.tanh(0.5 * x + b), (b,)),
                (Equilibrium(0.5 * torch.eye(4), b, TANH), ()),
            ):
                assert fixed_point(f, torch.zeros(3, 4), *args, solver=Newton()).converged.all()

    def test_what_cannot_be_differentiated_is_refused_or_solved_without_derivatives(self):
        b = torch.randn(3, 4)

        def detached(x, b):
            return torch.tanh(0.5 * x + b).detach()

        with pytest.raises(ArgumentError, match=r"Newton: expected f differentiable by autograd.*dense=False"):
            fixed_point(detached, torch.zeros(3, 4), b, solver=Newton())
        assert fixed_point(detached, torch.zeros(3, 4), b, solver=Newton(dense=False)).converged.all()
        with (
            torch.inference_mode(),
            pytest.raises(ArgumentError, match=r"got torch.inference_mode\(\). Use torch.no_grad\(\)"),
        ):
            fixed_point(lambda x, b: 0.5 * x + b, torch.zeros(3, 4), b, solver=Newton(dense=True))

    @pytest.mark.float64
    def test_exact_gradients_through_newton(self):
        layer = nn.Linear(5, 5, bias=False)
        b = torch.randn(3, 5, requires_grad=True)

        def solve(weight, b):
            adjoint = ImplicitAdjoint(solver=GMRES())
            return fixed_point(
                lambda x, b: torch.tanh(x @ weight.t() + b), torch.zeros(3, 5), b, solver=Newton(), adjoint=adjoint
            ).value

        assert torch.autograd.gradcheck(solve, (layer.weight.detach().requires_grad_(), b), fast_mode=True)

    @pytest.mark.float64
    @pytest.mark.parametrize("solver", [Newton(dense=True, rtol=1e-14), Broyden()], ids=repr)
    def test_unrolled(self, solver):
        A = (0.3 * torch.randn(4, 4)).requires_grad_()
        b = torch.randn(2, 4, requires_grad=True)
        for wrap in (lambda A, b: Equilibrium(A, b, TANH), lambda A, b: lambda x: torch.tanh(x @ A.t() + b)):
            exact, unrolled = (
                torch.autograd.grad(
                    fixed_point(wrap(A, b), torch.zeros(2, 4), solver=solver, adjoint=adjoint).value.sin().sum(), (A, b)
                )
                for adjoint in (ImplicitAdjoint(), Unrolled())
            )
            assert all(torch.allclose(p, q, atol=1e-8) for p, q in zip(exact, unrolled, strict=True))


class TestGMRES:
    def test_as_many_products_as_there_are_eigenvalues(self):
        # Three eigenvalues, far from the unit disc, on twelve dimensions: three products, the start and the answer.
        basis = torch.linalg.qr(torch.randn(12, 12))[0]
        A = basis @ torch.diag(torch.tensor([5.0, -3.0, 0.5]).repeat(4)) @ basis.t()
        assert steps(affine(A), torch.randn(4, 12), GMRES()).tolist() == [5] * 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_adversarial_spectra_in_one_cycle(self, dtype):
        n = 30
        positive, unit = torch.rand(n, n), torch.eye(n, dtype=torch.float64)
        for name, A in {
            "cycle": 0.99 * torch.eye(n).roll(1, 0),
            "circular law": 0.95 * torch.randn(n, n) / n**0.5,
            "nilpotent": torch.diag(torch.ones(n - 1), 1),
            "outside": 3 * torch.randn(n, n) / n**0.5,
            "indefinite": torch.diag(torch.linspace(-3, 3.1, n)),
            "nonnegative": 0.99 * positive / positive.sum(dim=1, keepdim=True),
        }.items():
            A, b = A.to(dtype), torch.randn(3, n, dtype=dtype)
            solution = fixed_point(affine(A), torch.zeros_like(b), b, solver=GMRES(restart=n))
            exact = torch.linalg.solve(unit - A.double(), b.t().double()).t()
            condition = float(torch.linalg.cond(unit - A.double()))
            assert solution.converged.all(), name
            assert solution.steps.max() <= n + 4, name
            error = (solution.value - exact).norm() / exact.norm()
            assert error < 10 * condition * GMRES().tolerance(dtype), name

    @pytest.mark.float64
    def test_its_residual_is_the_smallest_of_the_krylov_space(self):
        n, k = 20, 6
        A, b = 0.9 * torch.randn(n, n) / n**0.5, torch.randn(1, n)
        solution = fixed_point(
            affine(A), torch.zeros(1, n), b, solver=GMRES(max_steps=k + 2), on_failure="ignore"
        )  # the start, k products, the answer
        M = torch.eye(n) - A
        space = torch.stack([torch.linalg.matrix_power(M, i) @ b[0] for i in range(k)], dim=1)
        smallest = torch.linalg.lstsq(M @ space, b.t()).solution
        x = space @ smallest
        assert torch.allclose(solution.value[0], x[:, 0])

    def test_restarts_go_on_from_the_iterate(self):
        A, b = 0.9 * torch.randn(40, 40) / 40**0.5, torch.randn(3, 40)
        solution = fixed_point(affine(A), torch.zeros_like(b), b, solver=GMRES(restart=7))
        assert solution.converged.all()

    @pytest.mark.float64
    def test_as_the_adjoints_solver_where_the_spectral_radius_is_above_one(self):
        A = torch.linalg.qr(torch.randn(4, 4))[0] @ torch.diag(torch.tensor([-3.0, -2.0, 0.5, 0.1]))
        A, b = (0.9 * A).requires_grad_(), torch.randn(2, 4, requires_grad=True)

        def solve(A, b, order):
            adjoint = ImplicitAdjoint(order=order, solver=GMRES())
            return fixed_point(
                affine(A), torch.zeros(2, 4), b, solver=GMRES(), adjoint=adjoint, on_failure="raise"
            ).value

        assert torch.autograd.gradcheck(lambda A, b: solve(A, b, 1), (A, b), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda A, b: solve(A, b, 2), (A, b), fast_mode=True)

    def test_a_map_that_is_not_affine_is_never_claimed_solved_when_it_is_not(self):
        f = lambda x, b: 3 * torch.sin(5 * x) + b  # noqa: E731
        b = torch.randn(20, 3)
        solution = fixed_point(f, torch.zeros_like(b), b, solver=GMRES(max_steps=60), on_failure="ignore")
        residual = (f(solution.value, b) - solution.value).norm(dim=1) / f(solution.value, b).norm(dim=1)
        assert torch.allclose(solution.residual, residual)
        assert (solution.converged == (residual <= 1e-10)).all()

    @pytest.mark.parametrize("solver", [GMRES(), Newton(dense=False)], ids=repr)
    def test_unrolled_is_refused(self, solver):
        b = torch.ones(1, 2, requires_grad=True)
        with pytest.raises(ArgumentError, match=r"ImplicitAdjoint\(\) in place of Unrolled\(\)"):
            fixed_point(lambda x, b: 0.5 * x + b, torch.zeros(1, 2), b, solver=solver, adjoint=Unrolled())


class TestSplitting:
    @pytest.mark.float64
    @settings(deadline=None, max_examples=15)
    @given(seed=st.integers(0, 10_000), n=st.integers(1, 40), size=st.floats(0.1, 3.0))
    def test_peaceman_rachford_solves_monotone_models_however_large_a_is(self, seed, n, size):
        torch.manual_seed(seed)
        f = Equilibrium(monotone(n, m=0.2, size=size), torch.randn(4, n))
        solution = fixed_point(f, torch.zeros(4, n), solver=PeacemanRachford(max_steps=1000), on_failure="raise")
        newton = fixed_point(f, torch.zeros(4, n), solver=Newton(), on_failure="raise")
        assert torch.allclose(solution.value, newton.value, atol=1e-6)

    def test_it_converges_where_the_spectral_radius_of_abs_a_is_far_above_one(self):
        A = monotone(60, m=0.1, size=3.0)
        f = Equilibrium(A, torch.randn(3, 60))
        assert torch.linalg.eigvals(A.abs()).abs().max() > 20
        assert fixed_point(f, torch.zeros(3, 60), solver=PeacemanRachford()).converged.all()
        assert not fixed_point(f, torch.zeros(3, 60), solver=Picard(), on_failure="ignore").converged.any()

    @pytest.mark.parametrize("size", [1.0, 3.0])
    @pytest.mark.parametrize("m", [0.01, 0.1, 0.5])
    def test_its_default_step_is_not_slower_than_that_of_the_bound(self, size, m):
        f = Equilibrium(monotone(50, m, size), torch.randn(4, 50))
        default, of_the_bound = (
            fixed_point(f, torch.zeros(4, 50), solver=PeacemanRachford(alpha=alpha, max_steps=2000)).steps.max()
            for alpha in (None, 1 / f.bounds()[1])
        )
        assert default <= of_the_bound

    @pytest.mark.parametrize("solver", MONOTONE_SOLVERS, ids=repr)
    def test_gradients_of_monotone_models(self, solver):
        # Slopes of 0.01 and 1 in the adjoint, both orders; those of 0 and 1 are in the next test.
        raw = (0.5 * torch.randn(2, 2, dtype=torch.float64)).requires_grad_()
        b = torch.tensor([[1.0, -0.5], [-2.0, 0.3]], dtype=torch.float64, requires_grad=True)

        def solve(raw, b, order=1):
            unit = torch.eye(2, dtype=raw.dtype)
            A = 0.5 * unit - raw.triu().t() @ raw.triu() + raw.tril(-1) - raw.tril(-1).t()
            adjoint = ImplicitAdjoint(order=order, solver=solver)
            f = Equilibrium(A, b, LEAKY_RELU)
            return fixed_point(f, torch.zeros_like(b), solver=solver, adjoint=adjoint, on_failure="raise").value

        assert torch.autograd.gradcheck(solve, (raw, b), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda raw, b: solve(raw, b, 2), (raw, b), fast_mode=True)

    @pytest.mark.float64
    @pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
    def test_the_adjoint_against_a_dense_solve_with_half_of_the_slopes_zero(self, alpha):
        A, b = monotone(12, 0.3, 2.0), torch.randn(4, 12, requires_grad=True)
        solver = PeacemanRachford(alpha=alpha, max_steps=3000)
        f = Equilibrium(A, b)
        x = fixed_point(f, torch.zeros(4, 12), solver=solver, adjoint=ImplicitAdjoint(solver=solver)).value
        g = torch.randn(4, 12)
        (db,) = torch.autograd.grad(x, b, g)
        slope = (x.detach() > 0).double()
        assert 0 < slope.sum() < slope.numel()
        J = slope.unsqueeze(2) * A
        v = torch.linalg.solve(torch.eye(12) - J.transpose(1, 2), g.unsqueeze(2)).squeeze(2)
        assert torch.allclose(db, v * slope, atol=1e-7)

    @pytest.mark.float64
    def test_a_leaky_relu_is_not_its_own_prox(self):
        # α ≠ 1 with φ in the place of prox_αf converges, to something else.
        A, b = monotone(8, 0.5, 1.0), torch.randn(3, 8)
        f = Equilibrium(A, b, LEAKY_RELU)
        exact = fixed_point(f, torch.zeros(3, 8), solver=Newton()).value
        split = fixed_point(f, torch.zeros(3, 8), solver=PeacemanRachford(alpha=0.3, max_steps=2000)).value
        assert torch.allclose(split, exact, atol=1e-7)
        u = torch.tensor([-2.0, 3.0])
        assert torch.allclose(LEAKY_RELU.prox(u, 4.0), torch.tensor([0.01 * -2 / (0.01 + 4 * 0.99), 3.0]))
        assert torch.equal(RELU.prox(u, 4.0), torch.tensor([0.0, 3.0]))

    @pytest.mark.parametrize("activation", [a for a in BUILTIN.values() if a.homogeneous], ids=lambda a: a.name)
    @pytest.mark.parametrize("alpha", [0.1, 1.0, 7.0])
    def test_prox_solves_its_inclusion(self, activation, alpha):
        # u = y + α(z − y) for the z with y = φ(z): α(1/s − 1)y is α∂f(y), and any z ≤ 0 will do where ReLU gives 0.
        u = torch.linspace(-3, 3, 13)
        y = activation.prox(u, alpha)
        z = y + (u - y) / alpha
        assert torch.allclose(activation.phi(z), y, atol=1e-12)

    @pytest.mark.float64
    @pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus", "elu", "hardtanh"])
    def test_peaceman_rachford_takes_alpha_1_for_other_activations(self, name):
        f = Equilibrium(monotone(10, 0.3, 1.0), torch.randn(3, 10), BUILTIN[name])
        solution = fixed_point(f, torch.zeros(3, 10), solver=PeacemanRachford(max_steps=1000))
        newton = fixed_point(f, torch.zeros(3, 10), solver=Newton())
        assert torch.allclose(solution.value, newton.value, atol=1e-7)

    def test_forward_backward_takes_one_evaluation_a_step(self):
        class Watched(Equilibrium):
            products = 0

            def affine(self, y):
                Watched.products += 1
                return super().affine(y)

            def __call__(self, x):
                raise AssertionError("evaluated beside the pre-activation")

        f = Watched(monotone(6, 0.5, 0.3), torch.randn(1, 6))
        with torch.no_grad():
            solution = fixed_point(f, torch.zeros(1, 6), solver=ForwardBackward())
        assert Watched.products == int(solution.steps)

    def test_peaceman_rachford_counts_its_products_and_inverts_once(self):
        class Watched(Equilibrium):
            inverses = products = 0

            def affine(self, y):
                Watched.products += 1
                return super().affine(y)

            def resolvent(self, alpha):
                Watched.inverses += 1
                apply = super().resolvent(alpha)

                def counted(rhs):
                    Watched.products += 1
                    return apply(rhs)

                return counted

        f = Watched(monotone(6, 0.1, 1.0), torch.randn(1, 6))
        for max_steps in (2, 3, 5, 17, 300):
            Watched.products = Watched.inverses = 0
            with torch.no_grad():
                solver = PeacemanRachford(max_steps=max_steps)
                solution = fixed_point(f, torch.zeros(1, 6), solver=solver, on_failure="ignore")
            assert Watched.products == int(solution.steps) <= max_steps
            assert Watched.inverses == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("solver", [PeacemanRachford(), ForwardBackward()], ids=repr)
    def test_low_precision(self, solver, dtype):
        A, b = monotone(10, 0.8, 0.4).to(dtype), torch.randn(3, 10).to(dtype)
        solution = fixed_point(Equilibrium(A, b), torch.zeros_like(b), solver=solver)
        assert solution.converged.all()
        assert solution.value.dtype == dtype

    @pytest.mark.parametrize(
        ("solve", "message"),
        [
            (lambda A, b: fixed_point(torch.tanh, b, solver=PeacemanRachford()), r"φ\(Ax \+ b\) of known A"),
            (
                lambda A, b: fixed_point(LowRankEquilibrium(A, A, b), b, solver=ForwardBackward()),
                "got one of unknown structure. Pass Equilibrium",
            ),
            (
                lambda A, b: fixed_point(Equilibrium(A, b, TANH), b, solver=PeacemanRachford(alpha=0.5)),
                r"alpha=1 for an activation that is not positively homogeneous, got alpha=0.5 for tanh",
            ),
            (
                lambda A, b: fixed_point(Equilibrium(A, b, TANH), b, solver=ForwardBackward()),
                r"positively homogeneous activation, such as RELU, got tanh. Use PeacemanRachford\(\)",
            ),
            (
                lambda A, b: fixed_point(Equilibrium(A + 2 * torch.eye(3), b), b, solver=ForwardBackward()),
                r"ForwardBackward: expected I − A ⪰ mI with m > 0, got m=-1",
            ),
        ],
    )
    def test_maps_they_do_not_serve(self, solve, message):
        with pytest.raises(ArgumentError, match=message):
            solve(torch.zeros(3, 3), torch.ones(2, 3))


class ResidualBlock(nn.Module):
    """The tutorial's block, small."""

    def __init__(self, channels, inner):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(8, c) for c in (inner, channels, channels))
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, x, u):
        y = self.norm1(torch.relu(self.conv1(x)))
        return self.norm3(torch.relu(x + self.norm2(u + self.conv2(y))))


@pytest.mark.parametrize("seed", range(3))
def test_auto_takes_at_most_one_step_more_than_the_best_of_both_on_the_tutorials_block(seed, float32):
    torch.manual_seed(seed)
    f, u = ResidualBlock(16, 24), torch.randn(3, 16, 10, 10)
    with torch.no_grad():
        plain, anderson, auto = (
            fixed_point(f, torch.zeros_like(u), u, solver=solver).steps
            for solver in (Picard(rtol=1e-3), Anderson(rtol=1e-3), Auto(rtol=1e-3))
        )
    assert (auto <= torch.minimum(plain, anderson) + 1).all()


def test_the_tolerance_of_auto_holds_for_the_solver_that_takes_over():
    A, b = 0.95 * torch.randn(60, 60) / 60**0.5, torch.randn(1, 60)
    alone, tight = (steps(affine(A), b, GMRES(restart=60, rtol=rtol)) for rtol in (1e-3, None))
    auto = steps(affine(A), b, Auto(rtol=1e-3, slow=GMRES(restart=60)))
    assert auto <= alone + 5 < tight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Broyden(memory=0), "memory to be a positive integer, got 0"),
        (lambda: Broyden(growth=0.0), "growth to be a positive finite number"),
        (lambda: Broyden(line_search="armijo"), "line_search to be True or False, got 'armijo'"),
        (lambda: Newton(dense="yes"), "dense to be True, False or None, got 'yes'"),
        (lambda: Newton(krylov=0), "krylov to be a positive integer"),
        (lambda: GMRES(restart=0), "restart to be a positive integer"),
        (lambda: PeacemanRachford(alpha=-1.0), "PeacemanRachford: expected alpha to be a positive finite number"),
        (lambda: PeacemanRachford(sweeps=0), "sweeps to be a positive integer"),
        (lambda: ForwardBackward(alpha=0.0), "ForwardBackward: expected alpha to be a positive"),
    ],
)
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_a_typo_in_a_setting_is_a_type_error():
    for solver in {type(solver) for solver in (*SOLVERS, *MONOTONE_SOLVERS)}:
        assert issubclass(solver, Solver)
        with pytest.raises(TypeError, match="max_iter"):
            solver(max_iter=10)
