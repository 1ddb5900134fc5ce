"""Solvers of state matching: optimality, certificates and feasibility of every row, and what they refuse."""

from __future__ import annotations

import math
import warnings
from functools import partial

import cvxpy
import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given

from implicitdl import ArgumentError
from implicitdl.activations import TANH
from implicitdl.equations.equilibrium import Equilibrium
from implicitdl.fixed_point import fixed_point
from implicitdl.sim import SIMWarning
from implicitdl.sim import problem as sim_problem
from implicitdl.sim.certificate import cast_inside, dual_gap
from implicitdl.sim.problem import RowProblem
from implicitdl.sim.solvers import (
    ADMMMultiGPUSolver,
    ADMMSolver,
    BaseSolver,
    CVXSolver,
    LeastSquareSolver,
    OneSidedSolver,
    ProjectedGDLowRankSolver,
    distributed,
)
from implicitdl.sim.solvers.base_solver import warn_unbounded
from implicitdl.sim.solvers.distributed import in_batches, same_states

INF = math.inf
DOUBLE = torch.float64  # in which solutions are, whatever the dtype of the states


def problem(n=6, p=8, m=40, rows=5, lam=1e-2, kappa=0.7, ridge=0.0, seed=0, spread=0.0, dtype=None):
    """Rows of which some lie on the ball; `spread` makes the inputs nearly rank-deficient."""
    g = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=g, dtype=dtype)
    X = normal(n, m).relu()
    U = normal(p, m) * torch.logspace(0, -spread, p, dtype=dtype)[:, None]
    inside = normal(rows, n) / (4 * n) @ X + normal(rows, p) @ U
    T = inside + torch.linspace(0, 2, rows, dtype=dtype)[:, None] * normal(rows, m)
    return RowProblem(X=X, U=U, T=T, lam=lam, kappa=kappa, ridge=ridge)


def oracle(task: RowProblem) -> torch.Tensor:
    """Optimal objectives by CVXPY + Clarabel, tightly."""
    X, U = task.X.double().numpy(), task.U.double().numpy()
    values = []
    for t in task.T.double().numpy():
        a, b = cvxpy.Variable(len(X)), cvxpy.Variable(len(U))
        w = cvxpy.hstack([a, b])
        loss = 0.5 * cvxpy.sum_squares(t - X.T @ a - U.T @ b) + task.lam * cvxpy.norm1(w)
        ball = [cvxpy.norm1(a) <= task.kappa] if task.kappa < INF else []
        done = cvxpy.Problem(cvxpy.Minimize(loss + 0.5 * task.ridge * cvxpy.sum_squares(w)), ball)
        done.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        values.append(done.value)
    return torch.tensor(values, dtype=torch.float64)


def states(n=5, p=4, q=2, m=60, seed=0, dtype=None):
    """X, U, Z, Y of a small ReLU network, last layer first."""
    g = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=g, dtype=dtype)
    U = normal(p, m)
    first = normal(n - 2, p) / p @ U
    last = normal(2, n - 2) @ first.relu()
    Z = torch.cat([last, first])
    return Z.relu(), U, Z, normal(q, 2) @ last.relu()


CASES = [
    {},
    {"kappa": INF},
    {"lam": 1e-6},
    {"lam": 1e-6, "spread": 4.0},
    {"lam": 1e-6, "m": 7},
    {"lam": 3.0},
    {"lam": 1e4},
    {"lam": 0.0},
    {"lam": 0.0, "kappa": INF},
    {"lam": 0.0, "m": 7},
    {"ridge": 0.3},
    {"ridge": 0.3, "lam": 0.0},
    {"ridge": 0.3, "kappa": INF},
    {"kappa": 5.0},
    {"kappa": 1e-3},
    {"n": 1, "p": 1},
    {"m": 1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_is_certified_and_as_good_as_the_oracles(case):
    task = problem(**case)
    found = ADMMSolver().solve_rows(task)
    assert found.report.converged.all()
    torch.testing.assert_close(found.report.objective, oracle(task), rtol=1e-7, atol=1e-8)
    assert (found.a.abs().sum(dim=1) <= task.kappa).all()
    torch.testing.assert_close(found.report.norm, found.a.abs().sum(dim=1))
    assert (found.report.support == (found.w != 0).sum(dim=1)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_gap_at_the_optimum(case):
    report = ADMMSolver(tol=1e-11).solve_rows(problem(**case, dtype=DOUBLE)).report
    assert report.converged.all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gap_bounds_the_distance_from_the_optimum_of_any_feasible_row(case):
    task = problem(**case)
    best = ADMMSolver(tol=1e-11).solve_rows(task)
    for size in (1e-6, 1e-3, 1.0):
        w = best.w + size * torch.randn_like(best.w)
        w[:, : task.n] = cast_inside(w[:, : task.n], w.dtype, task.kappa)
        report, _ = dual_gap(task, w, tol=0.0)
        excess = report.objective - best.report.objective
        assert (report.gap >= excess - best.report.gap - 1e-12 * report.objective).all()
        assert (report.gap <= report.objective).all()


def test_the_report_is_that_of_the_data():
    task = problem(dtype=DOUBLE)
    found = ADMMSolver().solve_rows(task)
    residual = task.T - found.a @ task.X - found.b @ task.U
    objective = 0.5 * residual.square().sum(dim=1) + task.lam * found.w.abs().sum(dim=1)
    torch.testing.assert_close(found.report.objective, objective)


def test_karush_kuhn_tucker():
    """Written out: the gradient of every entry against λ, and against λ + τ in the ball."""
    task = problem(lam=0.5, kappa=0.3, dtype=DOUBLE)
    found = ADMMSolver(tol=1e-12).solve_rows(task)
    residual = task.T - found.a @ task.X - found.b @ task.U
    g_a, g_b = residual @ task.X.t(), residual @ task.U.t()
    tight = found.a.abs().sum(dim=1) > 0.3 * (1 - 1e-12)
    assert tight.any()
    assert not tight.all()
    tau = torch.where(tight, g_a.abs().amax(dim=1) - 0.5, 0.0)
    assert (tau >= 0).all()
    bound = (0.5 + tau)[:, None]
    torch.testing.assert_close((bound * found.a.sign())[found.a != 0], g_a[found.a != 0])
    torch.testing.assert_close((0.5 * found.b.sign())[found.b != 0], g_b[found.b != 0])
    assert (g_a.abs() <= bound * (1 + 1e-9)).all()
    assert (g_b.abs() <= 0.5 * (1 + 1e-9)).all()


def test_exact_duplicates_and_zeros_in_the_data():
    base = problem(lam=1e-3)
    X = torch.cat([base.X, base.X, torch.zeros(2, 40)])
    U = torch.cat([base.U, -base.U, torch.zeros(1, 40)])
    task = RowProblem(X=X, U=U, T=base.T, lam=1e-3, kappa=0.7)
    found = ADMMSolver().solve_rows(task)
    assert found.report.converged.all()
    torch.testing.assert_close(
        found.report.objective, ADMMSolver().solve_rows(base).report.objective, rtol=1e-6, atol=0
    )
    assert not found.a[:, -2:].any()
    assert not found.b[:, -1].any()


def test_no_target_and_a_penalty_above_the_largest_give_zero():
    task = problem()
    assert not ADMMSolver().solve_rows(task.replace(T=torch.zeros_like(task.T))).w.any()
    largest = float(task.lambda_max().max())
    above = ADMMSolver().solve_rows(task.replace(lam=largest * 1.001))
    assert not above.w.any()
    assert (above.report.gap == 0).all()
    assert ADMMSolver().solve_rows(task.replace(lam=largest * 0.999)).w.any()


def test_a_batch_is_its_rows():
    task = problem(rows=7)
    together = ADMMSolver(tol=1e-12).solve_rows(task)
    alone = [ADMMSolver(tol=1e-12).solve_rows(task[torch.tensor([row])]).w for row in range(7)]
    torch.testing.assert_close(torch.cat(alone), together.w, rtol=1e-9, atol=1e-9)
    X, U, Z, Y = states()
    whole = ADMMSolver(lambda_z=1e-3, lambda_y=1e-3).fit(X, U, Z, Y)
    dealt = ADMMSolver(lambda_z=1e-3, lambda_y=1e-3, batch_feature_size=2).fit(X, U, Z, Y)
    for a, b in zip(whole, dealt, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_more_samples_than_a_chunk_are_passed_over_in_chunks(monkeypatch):
    task = problem()
    whole = ADMMSolver(tol=1e-12).solve_rows(task)
    monkeypatch.setattr("implicitdl.sim.problem._CHUNK", 7)
    chunked = ADMMSolver(tol=1e-12).solve_rows(task.replace(T=task.T.clone())[torch.arange(5)])
    fresh = ADMMSolver(tol=1e-12).solve_rows(problem())
    for other in (chunked, fresh):
        torch.testing.assert_close(other.w, whole.w, rtol=1e-8, atol=1e-9)


def test_float32_states_are_solved_in_float64():
    task = problem()
    narrow = RowProblem(X=task.X.float(), U=task.U.float(), T=task.T.float(), lam=1e-2, kappa=0.7)
    found = ADMMSolver().solve_rows(narrow)
    assert found.a.dtype == torch.float64
    assert found.report.converged.all()
    torch.testing.assert_close(
        found.report.objective, ADMMSolver().solve_rows(task).report.objective, rtol=1e-4, atol=0
    )


def test_warm_starts_end_where_cold_ones_do():
    task = problem(lam=1.0)
    lambdas = [10.0, 3.0, 1.0, 0.1, 1e-3, 1e-6, 2.0]
    for lam, warm in zip(lambdas, ADMMSolver(tol=1e-10).path(task, lambdas), strict=True):
        cold = ADMMSolver(tol=1e-10).solve_rows(task.replace(lam=lam))
        assert warm.report.converged.all()
        torch.testing.assert_close(warm.report.objective, cold.report.objective, rtol=1e-9, atol=1e-12)


def test_too_few_steps_are_reported_and_warned():
    X, U, Z, Y = states(dtype=DOUBLE)
    noisy = Z + torch.randn_like(Z)
    with pytest.warns(
        SIMWarning, match=r"ADMMSolver: \d of 5 rows of \(A, B\) did not reach a relative duality gap of 1e-06"
    ):
        found = ADMMSolver(lambda_z=5.0, lambda_y=1e-3, max_steps=1).fit(X, U, noisy, Y)
    assert not found.hidden.converged.all()
    assert (found.hidden.relative_gap[~found.hidden.converged] > 1e-6).all()
    assert (found.A.abs().sum(dim=1) <= 0.99).all()


@given(
    n=st.integers(1, 6), p=st.integers(0, 6), m=st.integers(1, 30), seed=st.integers(0, 99),
    lam=st.sampled_from([0.0, 1e-8, 1e-4, 0.1, 10.0]), kappa=st.sampled_from([1e-3, 0.5, 0.99, INF]),
    ridge=st.sampled_from([0.0, 0.1]), spread=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_properties(n, p, m, seed, lam, kappa, ridge, spread):
    task = problem(n=n, p=p, m=m, seed=seed, lam=lam, kappa=kappa, ridge=ridge, spread=spread)
    found = ADMMSolver().solve_rows(task)
    assert found.report.converged.all()
    assert (found.report.gap >= 0).all()
    assert (found.a.abs().sum(dim=1) <= kappa).all()
    other = torch.randn(task.shape, dtype=DOUBLE) * found.w.abs().amax()
    other[:, :n] = cast_inside(other[:, :n], other.dtype, kappa)
    report, _ = dual_gap(task, other, tol=0.0)
    assert (report.gap >= 0).all()
    # Nothing feasible is better than what was found, by more than its gap.
    assert (report.objective >= found.report.objective - found.report.gap - 1e-12).all()


@given(seed=st.integers(0, 10_000), size=st.integers(1, 400), radius=st.floats(1e-3, 0.999))
def test_rounding_never_leaves_the_ball(seed, size, radius):
    A = torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    A = A / A.abs().sum(dim=1, keepdim=True) * radius
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inside = cast_inside(A, dtype, radius)
        assert inside.dtype == dtype
        assert (inside.abs().sum(dim=1) <= radius).all()
        torch.testing.assert_close(inside.double(), A, rtol=0.05, atol=1e-5)


# The other solvers.


@pytest.mark.parametrize("case", [{}, {"kappa": INF}, {"ridge": 0.3}, {"m": 7}], ids=str)
def test_cvx_agrees(case):
    task = problem(**case)
    found = CVXSolver(options={"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11}).solve_rows(task)
    assert found.report.converged.all()
    torch.testing.assert_close(
        found.report.objective, ADMMSolver().solve_rows(task).report.objective, rtol=1e-6, atol=0
    )
    assert (found.a.abs().sum(dim=1) <= task.kappa).all()


def test_cvx_hands_over_no_term_of_weight_zero(monkeypatch):
    handed, solve = [], cvxpy.Problem.solve
    monkeypatch.setattr(cvxpy.Problem, "solve", lambda self, **how: (handed.append(self), solve(self, **how))[1])
    for ridge in (0.0, 0.3):
        CVXSolver().solve_rows(problem(rows=1, ridge=ridge))
    plain, elastic = (task.objective.expr.args for task in handed)
    assert (len(plain), len(elastic)) == (2, 3)


def test_cvx_with_another_solver_in_groups_and_threads():
    task = problem()
    found = CVXSolver(solver="SCS", num_row=2, num_processes=2, tol=1e-2, options={"eps": 1e-9}).solve_rows(task)
    torch.testing.assert_close(
        found.report.objective, ADMMSolver().solve_rows(task).report.objective, rtol=1e-3, atol=0
    )


def test_exact_matching():
    """m < d: of all exact matches the one of smallest ‖w‖₁, which is the limit of λ → 0."""
    task = problem(n=4, p=12, m=6, rows=3, kappa=0.9, dtype=DOUBLE)
    found = CVXSolver(regularized=False).solve_rows(task)
    torch.testing.assert_close(task.predicted(found.w), task.T, rtol=0, atol=1e-6)
    assert found.report.converged.all()
    assert (found.a.abs().sum(dim=1) <= 0.9).all()
    limit = ADMMSolver().solve_rows(task.replace(lam=1e-8)).w.abs().sum(dim=1)
    torch.testing.assert_close(found.report.objective, limit, rtol=1e-5, atol=0)


def test_a_row_that_nothing_matches_is_named_infeasible():
    task = problem(kappa=0.5, dtype=DOUBLE)
    with pytest.warns(SIMWarning, match=r"CVXSolver: 4 of 5 problems are not optimal, CLARABEL says: infeasible"):
        found = CVXSolver(regularized=False).solve_rows(task)
    assert not found.w[1:].any()
    assert found.report.objective[1:].isinf().all()
    assert not found.report.converged[1:].any()
    assert found.report.converged[0]


def test_least_squares_says_when_nothing_bounds_a():
    X, U, Z, Y = states(dtype=DOUBLE)
    with pytest.warns(SIMWarning, match=r"LeastSquareSolver: ‖A‖∞ = .* is above κ = 0.1 by .*: the model need"):
        found = LeastSquareSolver().fit(X, U, Z, Y, {"kappa": 0.1})
    norm = float(found.hidden.norm.max())
    with pytest.warns(SIMWarning, match=r"is above κ = .* by 1e-09: the model need"):  # not seen in the digits shown
        warn_unbounded("LeastSquareSolver", found.hidden, norm - 1e-9)
    assert found.hidden.converged.all()
    torch.testing.assert_close(found.A @ X + found.B @ U, Z)
    torch.testing.assert_close(found.C @ X + found.D @ U, Y)


def test_least_squares_of_deficient_data_has_the_smallest_norm():
    task = problem(lam=0.0, kappa=INF)
    twice = RowProblem(X=task.X, U=torch.cat([task.U, task.U]), T=task.T, lam=0.0)
    found = LeastSquareSolver().solve_rows(twice)
    assert found.report.converged.all()
    torch.testing.assert_close(found.b[:, :8], found.b[:, 8:])
    torch.testing.assert_close(found.report.objective, ADMMSolver().solve_rows(task).report.objective)


def test_low_rank():
    X, U, Z, Y = states(n=8, p=5, m=200)
    full = ProjectedGDLowRankSolver(lr=1e-2).fit(X, U, Z, Y, {"kappa": 0.5})
    convex = ADMMSolver(lambda_z=1e-9, lambda_y=1e-6).fit(X, U, Z, Y, {"kappa": 0.5})
    torch.testing.assert_close(full.hidden.objective.sum(), convex.hidden.objective.sum(), rtol=2e-2, atol=1e-3)
    found = ProjectedGDLowRankSolver(rank=2, lr=1e-2).fit(X, U, Z, Y, {"kappa": 0.5})
    assert torch.linalg.matrix_rank(found.A) == 2
    L, R = found.factors
    torch.testing.assert_close(L @ R.t(), found.A)
    assert (found.A.abs().sum(dim=1) <= 0.5).all()
    assert found.hidden.objective.sum() >= full.hidden.objective.sum() * (1 - 1e-6)
    assert found.hidden.gap.isinf().all()
    assert found.output.converged.all()


def test_one_sided_asks_less():
    X, U, Z, Y = states(m=120)
    noisy = Z + 0.5 * torch.randn(Z.shape)
    config = {"kappa": 0.4}
    found = OneSidedSolver(lambda_z=0.1, lambda_y=0.1, tol=1e-8).fit(X, U, noisy, Y, config)
    both = ADMMSolver(lambda_z=0.1, lambda_y=0.1).fit(X, U, noisy, Y, config)
    assert found.hidden.converged.all()
    assert (found.hidden.objective <= both.hidden.objective + 1e-9).all()
    assert (found.A.abs().sum(dim=1) <= 0.4).all()
    n, p, values = len(X), len(U), []
    for z in noisy.numpy():
        a, b = cvxpy.Variable(n), cvxpy.Variable(p)
        fit = X.numpy().T @ a + U.numpy().T @ b
        loss = cvxpy.sum_squares((z - fit)[z > 0]) + cvxpy.sum_squares(cvxpy.pos(fit[z <= 0]))
        size = cvxpy.norm1(a) + cvxpy.norm1(b)
        task = cvxpy.Problem(cvxpy.Minimize(0.5 * loss + 0.1 * size), [cvxpy.norm1(a) <= 0.4])
        task.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11)
        values.append(task.value)
    torch.testing.assert_close(found.hidden.objective, torch.tensor(values, dtype=DOUBLE), rtol=1e-7, atol=1e-8)


def test_one_sided_with_states_that_are_never_on():
    X, U, Z, Y = states()
    found = OneSidedSolver(lambda_z=0.1, lambda_y=0.1).fit(X, U, -Z.abs() - 0.1, Y)
    assert not found.A.any()
    assert not found.B.any()
    assert (found.hidden.objective == 0).all()


# What `fit` adds to rows.


@pytest.mark.parametrize("solver", [ADMMSolver, CVXSolver, LeastSquareSolver, ProjectedGDLowRankSolver])
def test_intercepts_are_free(solver):
    X, U, Z, Y = states(dtype=DOUBLE)
    shifted = ADMMSolver if solver is None else solver
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SIMWarning)
        found = shifted().fit(X, U, Z + 3, Y - 2, {"kappa": 0.9}, intercept=True)
        same = shifted().fit(X, U, Z, Y, {"kappa": 0.9}, intercept=True)
    torch.testing.assert_close(found.b_x, same.b_x + 3, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.b_y, same.b_y - 2, rtol=1e-5, atol=1e-5)
    residual = Z + 3 - found.A @ X - found.B @ U - found.b_x[:, None]
    torch.testing.assert_close(residual.mean(dim=1), torch.zeros(5, dtype=DOUBLE), rtol=0, atol=1e-9)


def test_intercepts_are_those_of_an_unpenalised_column():
    X, U, Z, Y = states()
    found = ADMMSolver(lambda_z=0.1, lambda_y=0.1).fit(X, U, Z + 1, Y, {"kappa": 0.3}, intercept=True)
    values = []
    for z in (Z + 1).numpy():
        a, b, c = cvxpy.Variable(5), cvxpy.Variable(4), cvxpy.Variable()
        loss = 0.5 * cvxpy.sum_squares(z - X.numpy().T @ a - U.numpy().T @ b - c)
        penalty = 0.1 * (cvxpy.norm1(a) + cvxpy.norm1(b))
        task = cvxpy.Problem(cvxpy.Minimize(loss + penalty), [cvxpy.norm1(a) <= 0.3])
        values.append(task.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11))
    torch.testing.assert_close(found.hidden.objective, torch.tensor(values, dtype=DOUBLE), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("intercept", [False, True])
def test_regenerated_states_are_the_models_own(intercept):
    X, U, Z, Y = states(dtype=DOUBLE)
    solver = ADMMSolver(lambda_z=1e-2, lambda_y=1e-2, regen_states=True)
    found = solver.fit(X, U, Z, Y, {"kappa": 0.5, "activation_fn": TANH}, intercept=intercept)
    b = U.t() @ found.B.t() + (0.0 if found.b_x is None else found.b_x)
    own = fixed_point(Equilibrium(found.A, b, TANH), torch.zeros_like(b)).value.t()
    again = ADMMSolver(lambda_z=1e-2, lambda_y=1e-2).fit(own, U, Z, Y, intercept=intercept)
    torch.testing.assert_close(found.C, again.C, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.D, again.D, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.b_y, again.b_y, rtol=1e-4, atol=1e-5)


def test_solve_is_fit_in_the_seeds_shape():
    X, U, Z, Y = states()
    solver = ADMMSolver(lambda_z=1e-3, lambda_y=1e-3)
    A, B, C, D = solver.solve(X.numpy(), U.numpy(), Z.numpy(), Y.numpy(), {"kappa": 0.9, "device": "cpu", "atol": 1e-6})
    assert [tuple(W.shape) for W in (A, B, C, D)] == [(5, 5), (5, 4), (2, 5), (2, 4)]
    for given_, found in zip((A, B, C, D), solver.fit(X, U, Z, Y, {"kappa": 0.9}), strict=True):
        torch.testing.assert_close(given_, found)


def test_progress_counts_every_row_once():
    X, U, Z, Y = states()
    seen = []
    ADMMSolver(lambda_z=1e-2, lambda_y=1e-2, batch_feature_size=2).fit(
        X, U, Z, Y, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 7), (4, 7), (5, 7), (6, 7), (7, 7)]  # two batches of outputs, however few


class Ridge(BaseSolver):
    """A user's own, in numpy."""

    def solve(self, X, U, Z, Y, model_config=None):
        import numpy as np

        phi = np.concatenate([X, U])
        both = np.linalg.solve(phi @ phi.T + 0.1 * np.eye(len(phi)), phi @ np.concatenate([Z, Y]).T).T
        n = len(X)
        return 0 * both[:n, :n], both[:n, n:], both[n:, :n], both[n:, n:]


class Told(Ridge):
    lambda_z = lambda_y = 1e-3
    tol = 1e-6


def test_a_users_solver_gets_a_report():
    X, U, Z, Y = states(dtype=DOUBLE)
    found = Ridge().fit(X, U, Z, Y, intercept=True)
    assert found.hidden.gap.isinf().all()
    assert not found.hidden.converged.any()
    torch.testing.assert_close(found.b_x, Z.mean(dim=1) - found.B @ U.mean(dim=1))
    told = Told().fit(X, U, Z, Y)
    best = ADMMSolver(lambda_z=1e-3, lambda_y=1e-3).fit(X, U, Z, Y)
    assert (told.hidden.gap >= told.hidden.objective - best.hidden.objective - 1e-9).all()
    assert told.hidden.gap.isfinite().all()


# What is refused.


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"lambda_z": -1.0}, "ADMMSolver: expected lambda_z ≥ 0, got -1.0."),
        ({"lambda_y": math.nan}, "ADMMSolver: expected lambda_y ≥ 0, got nan."),
        ({"tol": -1e-9}, "ADMMSolver: expected 0 ≤ tol < 1"),
        ({"l1_ratio": 0.0}, "ADMMSolver: expected 0 < l1_ratio ≤ 1, got 0.0."),
        ({"rho_ab": 0.0}, "ADMMSolver: expected rho_ab to be a positive finite number"),
        ({"num_epoch_cd": 0}, "ADMMSolver: expected num_epoch_cd to be a positive integer"),
        ({"batch_feature_size": 0}, "ADMMSolver: expected batch_feature_size to be a positive integer"),
    ],
)
def test_settings_are_checked(settings_, message):
    with pytest.raises(ArgumentError, match=message.replace("(", r"\(")):
        ADMMSolver(**settings_)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CVXSolver(solver="NONE"), "CVXSolver: expected solver to be one of .*CLARABEL.*, got 'NONE'"),
        (lambda: CVXSolver(elastic_net=True, regularized=False), "elastic_net=True with regularized=True"),
        (lambda: ProjectedGDLowRankSolver(rank=0), "rank to be a positive integer, got 0"),
        (lambda: OneSidedSolver(num_epoch=0), "num_epoch to be a positive integer, got 0"),
    ],
)
def test_settings_of_the_others_are_checked(build, message):
    with pytest.raises(ArgumentError, match=message):
        build()


def test_a_typo_is_a_type_error():
    with pytest.raises(TypeError, match="lamda_z"):
        ADMMSolver(lamda_z=1.0)


@pytest.mark.parametrize("kappa", [1.0, 1.5, 0.0, -0.5, math.nan])
def test_kappa_is_checked(kappa):
    with pytest.raises(ArgumentError, match="ADMMSolver: expected kappa strictly between 0 and 1"):
        ADMMSolver().fit(*states(), {"kappa": kappa})


@pytest.mark.parametrize("name", ["X", "U", "Z", "Y"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [ADMMSolver(), Ridge()], ids=["ours", "own"])
def test_a_poisoned_state_is_named(name, bad, solver):
    poisoned = dict(zip("XUZY", states(), strict=True))
    poisoned[name] = poisoned[name].clone()
    poisoned[name][1, 3] = bad
    with pytest.raises(ArgumentError, match=rf"{type(solver).__name__}: expected finite {name}, got 1 NaN or infinite"):
        solver.fit(*poisoned.values())


def test_two_processes_solve_the_batches_of_one(monkeypatch):
    task, seen = problem(rows=7), []

    def solve(part, start):
        seen.append(part.T)
        return ADMMSolver().solve_rows(part)

    in_batches(solve, task, None, 500, lambda rows: None)
    alone = seen.copy()
    seen.clear()
    for rank in range(2):
        acting(monkeypatch, rank, 2, lambda packed, async_op: None)
        in_batches(solve, task, None, 500, lambda rows: None)
    assert len(seen) == len(alone) == 2
    assert all(torch.equal(one, two) for one, two in zip(alone, seen, strict=True))


def acting(monkeypatch, rank, world, all_reduce):
    """This process as one of so many."""
    monkeypatch.setattr(distributed, "_joined", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)


@pytest.mark.parametrize("m", [40, 5000])
def test_processes_make_the_gram_matrix_of_one(m):
    alone, shares = problem(m=m, ridge=0.5).gram, []
    for process in range(3):
        problem(m=m, ridge=0.5).gram_of_all(process, 3, lambda lower: shares.append(lower.clone()))
    together = problem(m=m, ridge=0.5)
    together.gram_of_all(0, 3, lambda lower: lower.copy_(sum(shares)))
    assert torch.equal(together.gram, alone)
    phi = torch.cat([together.X, together.U]).double()
    torch.testing.assert_close(alone, phi @ phi.t() + 0.5 * torch.eye(14, dtype=torch.float64))
    assert min(int((share != 0).sum()) for share in shares) > 0


def test_states_that_differ_between_processes_are_named(monkeypatch):
    X, U, Z, Y = states()
    others = []
    acting(monkeypatch, 0, 2, lambda extremes, op: others.append(extremes.clone()))
    same_states("Mine", (X, U, Z, Y))
    acting(monkeypatch, 1, 2, lambda extremes, op: torch.maximum(extremes, others[0], out=extremes))
    same_states("Mine", (X, U, Z, Y))
    for U_, Y_, names in ((U.flip(0), Y, "U"), (U, Y + 1e-6, "Y"), (U[:, 1:], Y[:1], "U, Y")):
        with pytest.raises(ArgumentError, match=f"Mine: expected the same states in every process, got {names} that"):
            same_states("Mine", (X, U_, Z, Y_))


def test_systems_are_solved_alike_alone_and_together(monkeypatch):
    task = problem(n=20, p=30, m=200, rows=9, lam=0.3)
    together = ADMMSolver().solve_rows(task)
    monkeypatch.setattr(sim_problem, "_ENTRIES_CPU", 1)
    torch.testing.assert_close(ADMMSolver().solve_rows(task).w, together.w)


def test_shapes_are_checked():
    X, U, Z, Y = states()
    with pytest.raises(ArgumentError, match=r"expected U of shape \(features, samples=60\), got \(60, 4\).*Columns"):
        ADMMSolver().fit(X, U.t(), Z, Y)
    with pytest.raises(ArgumentError, match=r"expected Z of X's shape \(5, 60\), got \(4, 60\)"):
        ADMMSolver().fit(X, U, Z[:4], Y)
    with pytest.raises(ArgumentError, match=r"expected Y to be floating .* got \(2, 60\) of torch.int64"):
        ADMMSolver().fit(X, U, Z, Y.long())
    with pytest.raises(ArgumentError, match=r"expected model_config of kappa, .*, got kapa"):
        ADMMSolver().fit(X, U, Z, Y, {"kapa": 0.5})
    with pytest.raises(ArgumentError, match=r"RowProblem: expected floating T of shape"):
        RowProblem(X=X, U=U, T=Y[0], lam=0.1)
    with pytest.raises(ArgumentError, match=r"RowProblem: expected kappa > 0, got 0.0"):
        RowProblem(X=X, U=U, T=Y, lam=0.1, kappa=0.0)


def test_what_a_user_returns_is_checked():
    class Short(BaseSolver):
        def solve(self, X, U, Z, Y, model_config=None):
            return X, U, Z, Y

    with pytest.raises(ArgumentError, match=r"Short.solve: expected A, B, C, D of shapes \[\(5, 5\)"):
        Short().fit(*states())


def test_refusals_of_the_special_solvers():
    X, U, Z, Y = states()
    with pytest.raises(ArgumentError, match="ProjectedGDLowRankSolver: expected rank ≤ n=5, got 6"):
        ProjectedGDLowRankSolver(rank=6).fit(X, U, Z, Y)
    with pytest.raises(
        ArgumentError, match="OneSidedSolver: expected ReLU without intercepts, got tanh, intercept=False"
    ):
        OneSidedSolver().fit(X, U, Z, Y, {"activation_fn": torch.tanh})
    with pytest.raises(
        ArgumentError, match="OneSidedSolver: expected ReLU without intercepts, got relu, intercept=True"
    ):
        OneSidedSolver().fit(X, U, Z, Y, intercept=True)
    with pytest.raises(
        ArgumentError, match=r"ADMMMultiGPUSolver: expected a GPU for every process, got .*gpu_ids=\[99\]"
    ):
        ADMMMultiGPUSolver(gpu_ids=[99]).fit(X, U, Z, Y)
