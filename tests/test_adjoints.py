"""Gradients: exact at their order, loud beyond it, leak-free, and the same whoever else is in the batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from implicitdl import (
    Anderson,
    ArgumentError,
    Auto,
    Equilibrium,
    ImplicitAdjoint,
    ImplicitFunctionWarning,
    LowRankEquilibrium,
    Monitor,
    PhantomGradient,
    Picard,
    Unrolled,
    fixed_point,
)
from implicitdl.activations import RELU, TANH
from implicitdl.testing import APPROXIMATE_ADJOINTS, EXACT_ADJOINTS, check_adjoint
from precision import digits


@pytest.mark.parametrize(
    ("adjoint", "solver"),
    [*((adjoint, Auto()) for adjoint in EXACT_ADJOINTS), (EXACT_ADJOINTS[0], Picard(max_steps=2000)),
     (EXACT_ADJOINTS[1], Anderson()), (Unrolled(), Picard(max_steps=2000)), (Unrolled(), Anderson())],
    ids=repr,
)  # fmt: skip
def test_gradcheck_to_the_claimed_order(adjoint, solver):
    check_adjoint(adjoint, solver)


def tanh_problem(n=4, batch=3):
    A = (0.4 * torch.randn(n, n) / n**0.5).requires_grad_()
    b = torch.randn(batch, n, requires_grad=True)

    def f(x):
        return torch.tanh(x @ A.t() + b)

    return A, b, f


def dense_adjoint(A, b, x, g):
    """(I − J)ᵀ v = g solved densely, sample by sample: the gradient with respect to f(x)."""
    slope = 1 - torch.tanh(x @ A.t() + b) ** 2
    J = slope.unsqueeze(2) * A
    return torch.linalg.solve(torch.eye(A.shape[0]) - J.transpose(1, 2), g.unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize("closed_form", [False, True])
def test_jacobian_against_a_dense_solve(closed_form):
    A, b, f = tanh_problem(n=20, batch=5)
    f = Equilibrium(A, b, TANH) if closed_form else f
    x = fixed_point(f, torch.zeros(5, 20)).value
    g = torch.randn(5, 20)
    dA, db = torch.autograd.grad(x, (A, b), g)
    slope = 1 - x.detach() ** 2
    v = dense_adjoint(A.detach(), b.detach(), x.detach(), g) * slope
    assert (db - v).abs().max() < digits(1e-8, 1e-3)
    assert (dA - v.t() @ x.detach()).abs().max() < digits(1e-8, 1e-3)


@pytest.mark.parametrize("adjoint", APPROXIMATE_ADJOINTS, ids=repr)
def test_phantom_gradient_is_the_cut_neumann_series(adjoint):
    A, b, f = tanh_problem()
    solution = fixed_point(f, torch.zeros(3, 4), adjoint=adjoint)
    x = solution.value.detach()
    g = torch.randn(3, 4)
    (db,) = torch.autograd.grad(solution.value, b, g)
    J = (1 - x**2).unsqueeze(2) * A.detach()
    tau = adjoint.damping
    step = (1 - tau) * torch.eye(4) + tau * J.transpose(1, 2)
    v = sum(tau * (torch.linalg.matrix_power(step, k) @ g.unsqueeze(2)).squeeze(2) for k in range(adjoint.steps))
    assert torch.allclose(db, v * (1 - x**2), atol=digits(1e-9, 1e-5))


def test_phantom_gradient_keeps_the_value_whose_residual_is_reported():
    _, _, f = tanh_problem()
    solver = Picard(rtol=1e-3)
    exact = fixed_point(f, torch.zeros(3, 4), solver=solver)
    phantom = fixed_point(f, torch.zeros(3, 4), solver=solver, adjoint=PhantomGradient(steps=3))
    assert torch.equal(exact.value, phantom.value)


@pytest.mark.parametrize("closed_form", [False, True])
def test_order_1_raises_at_the_second_derivative_and_only_there(closed_form):
    A, b, f = tanh_problem()
    f = Equilibrium(A, b, TANH) if closed_form else f
    target = torch.randn(3, 4, requires_grad=True)
    x = fixed_point(f, torch.zeros(3, 4)).value
    loss = ((x - target) ** 2).sum()
    plain = torch.autograd.grad(loss, (A, b), retain_graph=True)
    graph = torch.autograd.grad(loss, (A, b), create_graph=True)
    # The slope of the one is the compiled loop's, that of the other torch's.
    assert all(torch.allclose(p, q, rtol=digits(1e-12, 1e-5)) for p, q in zip(plain, graph, strict=True))
    # b and A through the map, target through the cotangent alone.
    for wanted in (A, b, target):
        with pytest.raises(RuntimeError, match=r"Pass adjoint=ImplicitAdjoint\(order=2\)"):
            torch.autograd.grad(graph[0].sum(), wanted, retain_graph=True)


def test_order_2_raises_at_the_third_derivative():
    A, b, f = tanh_problem()
    x = fixed_point(f, torch.zeros(3, 4), adjoint=ImplicitAdjoint(order=2)).value
    (first,) = torch.autograd.grad(x.pow(3).sum(), b, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="got a request for the next one"):
        torch.autograd.grad(second.pow(2).sum(), A)


@pytest.mark.parametrize("closed_form", [False, True])
def test_order_2_in_one_backward_with_the_first_derivative(closed_form):
    # A gradient penalty: first- and second-order cotangents arrive at the solution in the same backward.
    A, b, f = tanh_problem()

    def penalty(A, b, adjoint):
        g = Equilibrium(A, b, TANH) if closed_form else (lambda x: torch.tanh(x @ A.t() + b))
        x = fixed_point(g, torch.zeros(3, 4), adjoint=adjoint).value
        (db,) = torch.autograd.grad(x.pow(3).sum(), b, create_graph=True)
        return x.sum() + db.pow(2).sum()

    ours = torch.autograd.grad(penalty(A, b, ImplicitAdjoint(order=2)), (A, b))
    unrolled = torch.autograd.grad(penalty(A, b, Unrolled()), (A, b))
    for one, other in zip(ours, unrolled, strict=True):
        assert torch.allclose(one, other, atol=digits(1e-8, 1e-3))


def test_order_2_costs_a_plain_backward_no_second_solve():
    A, b, f = tanh_problem()
    x = fixed_point(f, torch.zeros(3, 4), adjoint=ImplicitAdjoint(order=2)).value
    with Monitor() as monitor:
        x.sum().backward()
    assert len(monitor.backward) == 1
    # The count can be two: a second derivative makes a solve of its own.
    x = fixed_point(f, torch.zeros(3, 4), adjoint=ImplicitAdjoint(order=2)).value
    with Monitor() as monitor:
        (db,) = torch.autograd.grad(x.pow(2).sum(), b, create_graph=True)
        db.pow(2).sum().backward()
    assert len(monitor.backward) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-13, 1e-30, 1e20])
def test_cotangents_of_any_size(size, dtype):
    if dtype == torch.float64:
        size = size**8  # as far out in float64's range
    A, b, _ = tanh_problem()
    A, b = A.detach().to(dtype), b.detach().to(dtype).requires_grad_()
    x = fixed_point(Equilibrium(A, b, TANH), torch.zeros_like(b)).value
    one, other = (torch.autograd.grad(x, b, torch.full_like(b, g), retain_graph=True)[0] for g in (1.0, size))
    assert torch.allclose(other / size, one, rtol=1e-4)


def test_zero_cotangent_gives_zero_at_once():
    A, b, f = tanh_problem()
    solution = fixed_point(f, torch.zeros(3, 4))
    g = torch.zeros(3, 4)
    g[1] = 1.0
    (db,) = torch.autograd.grad(solution.value, b, g)
    assert (db[[0, 2]] == 0).all()
    assert solution.backward.steps[0] == 1 < solution.backward.steps[1]


def test_backward_report_is_filled_by_backward_and_a_miss_is_loud():
    b = torch.ones(2, 1, requires_grad=True)
    rate = torch.tensor([[0.1], [0.99]])
    solution = fixed_point(
        lambda x, b, c: c * x + b, torch.zeros(2, 1), b, rate, adjoint=ImplicitAdjoint(solver=Picard(max_steps=30))
    )
    assert solution.backward.steps is None
    with pytest.warns(ImplicitFunctionWarning, match=r"backward\(Picard\): 1 of 2 samples"):
        solution.value.sum().backward()
    assert solution.backward.converged.tolist() == [True, False]
    assert solution.backward.steps[1] == 30


def test_many_forwards_without_backward_leave_nothing_alive():
    A, b, f = tanh_problem()
    alive = []

    class Token:
        pass

    class Probe(torch.autograd.Function):
        """Identity whose graph node holds something that can be watched."""

        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            alive.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    gc.disable()
    try:  # by reference counts alone: no cycle for the collector to find
        for order in (1, 2):
            for _ in range(50):
                adjoint = ImplicitAdjoint(order=order)
                fixed_point(lambda x: Probe.apply(f(x)), torch.zeros(3, 4), adjoint=adjoint, solver=Picard(rtol=0.1))
        assert len(alive) >= 100
        assert sum(ref() is not None for ref in alive) == 0
    finally:
        gc.enable()


def test_two_calls_before_one_backward_and_two_backwards_of_one_graph():
    A, b, f = tanh_problem()
    reference = torch.autograd.grad(fixed_point(f, torch.zeros(3, 4)).value.sum(), b)[0]
    first, second = (fixed_point(f, torch.zeros(3, 4)).value for _ in range(2))
    total = (first + 2 * second).sum()
    (once,) = torch.autograd.grad(total, b, retain_graph=True)
    (again,) = torch.autograd.grad(total, b)
    assert torch.allclose(once, 3 * reference)
    assert torch.equal(once, again)


def test_frozen_weights_give_a_value_without_graph():
    with torch.no_grad():
        A = 0.1 * torch.randn(4, 4)
    solution = fixed_point(lambda x: torch.tanh(x @ A), torch.ones(2, 4))
    assert not solution.value.requires_grad


def test_a_start_that_requires_grad_gets_no_gradient():
    x0 = torch.randn(3, 4, requires_grad=True)
    A, b, f = tanh_problem()
    x = fixed_point(f, x0).value
    x.sum().backward()
    assert x0.grad is None


def test_every_weight_a_closure_uses_gets_its_gradient():
    block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    with torch.no_grad():
        for weight in block.parameters():
            weight.mul_(0.5)
    fixed_point(lambda x: block(x), torch.zeros(2, 4)).value.sum().backward()
    assert all(weight.grad is not None for weight in block.parameters())


def test_gradient_of_a_sample_does_not_depend_on_its_batch_mates():
    A, b, _ = tanh_problem(batch=6)
    A = A.detach()
    easy_and_hard = torch.cat((0.01 * b[:3], 3 * b[3:])).detach().requires_grad_()

    def gradient(rows):
        part = easy_and_hard[rows]
        x = fixed_point(Equilibrium(A, part, TANH), torch.zeros_like(part)).value
        return torch.autograd.grad(x.pow(2).sum(), easy_and_hard)[0][rows]

    together = gradient(slice(0, 6))
    for i in range(6):
        assert torch.allclose(gradient(slice(i, i + 1))[0], together[i], rtol=digits(1e-9, 1e-4))


@pytest.mark.float64
def test_low_rank_equals_the_dense_product_in_value_and_gradient():
    L, R = (0.2 * torch.randn(12, 3)).requires_grad_(), (0.2 * torch.randn(12, 3)).requires_grad_()
    b = torch.randn(5, 12, requires_grad=True)
    zero = torch.zeros(5, 12)
    low = fixed_point(LowRankEquilibrium(L, R, b, TANH), zero)
    dense = fixed_point(Equilibrium(L @ R.t(), b, TANH), zero)
    assert torch.allclose(low.value, dense.value, atol=1e-9)
    x = low.value.detach()
    fx = torch.tanh(x @ (L @ R.t()).t() + b).detach()
    assert torch.allclose(low.residual, (fx - x).norm(dim=1) / fx.norm(dim=1), atol=1e-13)
    g = torch.randn(5, 12)
    for one, other in zip(
        torch.autograd.grad(low.value, (L, R, b), g), torch.autograd.grad(dense.value, (L, R, b), g), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-8)
    adjoint = ImplicitAdjoint(order=2)
    assert torch.autograd.gradgradcheck(
        lambda L, R, b: fixed_point(LowRankEquilibrium(L, R, b, TANH), zero, adjoint=adjoint).value,
        (L, R, b),
        fast_mode=True,
    )


def test_low_rank_can_be_unrolled():
    tensors = [(0.2 * torch.randn(shape)).requires_grad_() for shape in ((12, 3), (12, 3), (5, 12))]
    f = LowRankEquilibrium(*tensors, TANH)
    exact, unrolled = (
        torch.autograd.grad(fixed_point(f, None, adjoint=adjoint).value.sum(), tensors)
        for adjoint in (ImplicitAdjoint(), Unrolled())
    )
    assert all(torch.allclose(one, other, atol=1e-8) for one, other in zip(exact, unrolled, strict=True))


@pytest.mark.float64
def test_triangular_gradients_by_substitution():
    A, b = (2 * torch.randn(6, 6)).requires_grad_(), torch.randn(3, 6, requires_grad=True)

    def solve(A, b, activation, order=2):
        f = Equilibrium(A.triu(1), b, activation, triangular=True)
        return fixed_point(f, torch.zeros(3, 6), adjoint=ImplicitAdjoint(order=order)).value

    for activation in (TANH, RELU):
        assert torch.autograd.gradcheck(lambda A, b, a=activation: solve(A, b, a), (A, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda A, b: solve(A, b, TANH), (A, b), fast_mode=True)


def test_unrolled_refuses_what_it_cannot_differentiate():
    f = Equilibrium(torch.zeros(2, 2), torch.ones(1, 2, requires_grad=True), triangular=True)
    with pytest.raises(ArgumentError, match="solved by substitution"):
        fixed_point(f, torch.zeros(1, 2), adjoint=Unrolled())


@pytest.mark.parametrize("closed_form", [False, True])
def test_bfloat16_autocast_forward_and_backward(closed_form):
    layer = torch.nn.Linear(6, 6, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    u = torch.randn(3, 6, dtype=torch.float32, requires_grad=True)

    def gradient(autocast):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            b = torch.nn.functional.linear(u, torch.eye(6, dtype=torch.float32))
            f = Equilibrium(layer.weight, b, TANH) if closed_form else (lambda x: torch.tanh(layer(x) + b))
            solution = fixed_point(f, torch.zeros(3, 6, dtype=torch.float32))
            loss = solution.value.float().pow(2).sum()
        assert solution.converged.all()
        return torch.autograd.grad(loss, (u, layer.weight))

    for low, full in zip(gradient(True), gradient(False), strict=True):
        assert low.dtype == torch.float32
        assert (low - full).norm() < 0.05 * full.norm()


def test_in_place_changes_of_the_value_are_those_of_any_tensor():
    A, b, f = tanh_problem()
    x = fixed_point(f, torch.zeros(3, 4)).value
    y = x * 2
    y.mul_(3.0)
    (db,) = torch.autograd.grad(y.sum(), b)
    reference = torch.autograd.grad(6 * fixed_point(f, torch.zeros(3, 4)).value.sum(), b)[0]
    assert torch.allclose(db, reference)
    x = fixed_point(f, torch.zeros(3, 4)).value
    x.mul_(6.0)
    assert torch.allclose(torch.autograd.grad(x.sum(), b)[0], reference)


@pytest.mark.float64
def test_unrolled_picard_has_derivatives_of_higher_order():
    A, b, _ = tanh_problem(n=2, batch=1)

    def solve(A, b):
        return fixed_point(
            lambda x: torch.tanh(x @ A.t() + b), torch.zeros(1, 2), solver=Picard(), adjoint=Unrolled()
        ).value

    assert torch.autograd.gradgradcheck(solve, (A, b), fast_mode=True)


def test_order_is_checked():
    with pytest.raises(ArgumentError, match="order to be 1 or 2, got 3"):
        ImplicitAdjoint(order=3)
    with pytest.raises(ArgumentError, match="steps to be a positive integer, got 0"):
        PhantomGradient(steps=0)


class Mixed(torch.nn.Module):
    """x ↦ norm(c x W + u), three easy samples and a hard one; norm is the identity in eval mode."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4, bias=False, dtype=dtype)
        torch.nn.init.orthogonal_(self.linear.weight)
        self.norm = torch.nn.BatchNorm1d(4, affine=False, eps=0.0, dtype=dtype)
        self.rates = torch.tensor([[0.0], [0.0], [0.0], [0.95]], dtype=dtype)
        self.u = torch.randn(4, 4, dtype=dtype)
        self.sizes = []

    def forward(self, x, c, u):
        self.sizes.append(len(x))
        return self.norm(c * self.linear(x) + u)

    def solution(self, rows=slice(None), rtol=None):
        u, solver = self.u[rows].clone().requires_grad_(), Auto(rtol=rtol)
        adjoint = ImplicitAdjoint(solver=solver)
        start = torch.zeros_like(u)
        return u, fixed_point(
            self, start, self.rates[rows], u, solver=solver, adjoint=adjoint, on_failure="raise"
        ).value


class TestEasySamplesLeaveTheBackwardSolve:
    def test_they_cost_their_own_products_only_and_change_nothing(self):
        f = Mixed().eval()
        u, x = f.solution()
        f.sizes.clear()
        g = torch.randn_like(x)
        x.backward(g)
        assert set(f.sizes) == {1}  # evaluated once more by each stage of Auto, for the hard sample alone
        together = f.linear.weight.grad.clone()
        f.linear.weight.grad = None
        for i in range(4):
            v, alone = f.solution(slice(i, i + 1))
            alone.backward(g[i : i + 1])
            torch.testing.assert_close(u.grad[i : i + 1], v.grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(together, f.linear.weight.grad, rtol=1e-8, atol=1e-10)

    def test_a_module_whose_mode_was_changed_since_is_not_taken_for_the_same(self):
        f = Mixed().eval()
        u, x = f.solution()
        x.sum().backward()
        v, x = f.solution()
        f.train()
        x.sum().backward()
        torch.testing.assert_close(v.grad, u.grad, rtol=1e-8, atol=1e-10)

    @pytest.mark.float64
    def test_a_function_that_gives_other_values_since_is_not_taken_for_the_same(self):
        f = Mixed().eval()
        u, x = f.solution()
        x.sum().backward()
        v, x = f.solution()
        f.norm.running_mean = torch.ones(4)
        x.sum().backward()
        torch.testing.assert_close(v.grad, u.grad, rtol=1e-8, atol=1e-10)

    def test_the_autocast_region_of_the_forward_pass_holds(self):
        f = Mixed(torch.float32).eval()
        with torch.autocast("cpu", torch.bfloat16):
            u, x = f.solution(rtol=0.02)
        f.sizes.clear()
        x.float().sum().backward()
        assert set(f.sizes) == {1}
        assert torch.isfinite(u.grad).all()
