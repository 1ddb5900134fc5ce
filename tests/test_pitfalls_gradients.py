"""What breaks the gradients of other libraries' equilibrium layers, done with a `DEQ`: one test a defect.

Defects of the implicit model rather than of a layer (a gradient that ignores the projection of A, a φ' that stays
ReLU's) have theirs in test_model.py, the size of the cotangent in test_adjoints.py, and what makes f another map at
every evaluation in test_frozen.py.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from implicitdl import (
    DEQ,
    Anderson,
    ImplicitAdjoint,
    ImplicitFunctionWarning,
    Monitor,
    PhantomGradient,
    Picard,
    Unrolled,
)
from implicitdl.nn import ResidualBlock


class Block(nn.Module):
    """A contraction with weights of two kinds."""

    def __init__(self, n=4):
        super().__init__()
        self.inner, self.outer = nn.Linear(n, 2 * n), nn.Linear(2 * n, n)
        with torch.no_grad():
            for layer in (self.inner, self.outer):
                layer.weight.mul_(0.6)

    def forward(self, x, u):
        return self.outer(torch.tanh(self.inner(x) + u.repeat(1, 2)))


@pytest.fixture
def u():
    return torch.randn(3, 4, requires_grad=True)


@pytest.mark.float64
def test_the_default_gradient_is_exact_in_the_input_and_every_weight(u):
    deq = DEQ(Block())
    names = [name for name, _ in deq.named_parameters()]

    def call(u, *weights):
        return torch.func.functional_call(deq, dict(zip(names, weights, strict=True)), (u,))

    assert torch.autograd.gradcheck(call, (u, *deq.parameters()), fast_mode=True)


@pytest.mark.float64
def test_the_default_gradient_of_a_convolutional_block_is_exact():
    deq = DEQ(ResidualBlock(2, 2, num_groups=2), solver=Anderson(max_steps=500))
    image = torch.randn(1, 2, 3, 3, requires_grad=True)
    assert torch.autograd.gradcheck(deq, image, eps=1e-5, atol=1e-3, fast_mode=True)


def test_double_backward_is_an_error_at_order_1_and_not_a_wrong_number(u):
    deq = DEQ(Block())
    (du,) = torch.autograd.grad(deq(u).pow(2).sum(), u, create_graph=True)
    assert du.requires_grad
    with pytest.raises(RuntimeError, match=r"Pass adjoint=ImplicitAdjoint\(order=2\)"):
        du.pow(2).sum().backward()


@pytest.mark.float64
def test_double_backward_is_exact_at_order_2(u):
    assert torch.autograd.gradgradcheck(DEQ(Block(), adjoint=ImplicitAdjoint(order=2)), u, fast_mode=True)


@pytest.mark.float64
def test_a_gradient_penalty_trains(u):
    deq = DEQ(Block(), adjoint=ImplicitAdjoint(order=2))
    reference = DEQ(deq.f, solver=Picard(), adjoint=Unrolled())

    def penalty(layer):
        (du,) = torch.autograd.grad(layer(u).sum(), u, create_graph=True)
        return torch.autograd.grad(du.pow(2).sum(), list(deq.f.parameters()), allow_unused=True)

    for ours, unrolled in zip(penalty(deq), penalty(reference), strict=True):
        assert (ours is None) == (unrolled is None)
        assert ours is None or torch.allclose(ours, unrolled, atol=1e-8)


def test_evaluation_mode_keeps_the_gradient_of_the_input(u):
    deq = DEQ(Block())
    trained = torch.autograd.grad(deq(u).pow(2).sum(), u)[0]
    evaluated = torch.autograd.grad(deq.eval()(u).pow(2).sum(), u)[0]
    assert torch.equal(trained, evaluated)
    assert trained.abs().sum() > 0


def test_no_weight_is_forgotten_wherever_f_finds_it(u):
    block, loose = Block(), torch.randn(4, requires_grad=True)
    scale = torch.full((1,), 0.5, requires_grad=True)
    DEQ(lambda x, u: scale * block(x, u) + loose)(u).sum().backward()
    assert all(weight.grad is not None for weight in (*block.parameters(), loose, scale, u))


def test_the_gradient_of_an_unconverged_solve_comes_with_its_residual_and_a_warning():
    u = torch.ones(3, 1, requires_grad=True)
    rate = torch.tensor([[0.1], [0.9], [0.99]])
    solver = Picard(rtol=1e-6, max_steps=20)
    deq = DEQ(lambda x, u, rate: rate * x + u, solver=solver, adjoint=ImplicitAdjoint(solver=solver))
    with pytest.warns(ImplicitFunctionWarning, match=r"fixed_point\(Picard\): 2 of 3 samples .*worst residual"):
        x = deq(u, rate)
    with pytest.warns(ImplicitFunctionWarning, match=r"backward\(Picard\): 2 of 3 samples .*worst residual"):
        x.sum().backward()
    error = (u.grad - 1 / (1 - rate)).abs() * (1 - rate)  # relative
    assert error.flatten().tolist() == pytest.approx([0.0, 0.1, 0.8], abs=0.05)
    for figures in (deq.stats, deq.stats.backward):
        assert figures.converged.tolist() == [True, False, False]
        assert figures.residual[0] < 1e-6 < figures.residual[1] < figures.residual[2]


def test_two_calls_before_one_backward(u):
    deq = DEQ(Block())
    one = torch.autograd.grad(deq(u).sum(), u)[0]
    first, second = deq(u), deq(2 * u)
    two = torch.autograd.grad(deq(2 * u).sum(), u)[0]
    (both,) = torch.autograd.grad((first + second).sum(), u)
    assert torch.allclose(both, one + two)


def test_a_second_backward_of_the_same_graph_is_the_first_again(u):
    x = DEQ(Block())(u)
    once, again = (torch.autograd.grad(x.pow(2).sum(), u, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    # create_graph turns on a guard around the gradient, and changes nothing about it.
    assert torch.equal(torch.autograd.grad(x.pow(2).sum(), u, create_graph=True)[0], once)


def living_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    "adjoint", [ImplicitAdjoint(), ImplicitAdjoint(order=2), PhantomGradient(), Unrolled()], ids=repr
)
def test_many_forwards_without_backward_leave_no_tensor_behind(u, adjoint):
    deq = DEQ(Block(), adjoint=adjoint, solver=Picard(rtol=1e-2))
    deq(u)
    before = living_tensors()
    for _ in range(50):
        deq(u)
    assert living_tensors() == before


def test_backward_that_runs_every_time_leaves_no_tensor_behind_either(u):
    deq = DEQ(Block())
    deq(u).sum().backward()
    before = living_tensors()
    for _ in range(10):
        deq(u).sum().backward()
    assert living_tensors() == before


def test_autocast_of_a_map_whose_values_are_float32_all_the_same():
    """A product in bfloat16 plus an input in float32: float32 digits, of which bfloat16's are right."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64, dtype=torch.float32)
    with torch.no_grad():
        linear.weight.mul_(1.2)
    deq = DEQ(lambda x, u: torch.tanh(linear(x) + u))
    u = torch.randn(32, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = deq(u)
    x.sum().backward()  # with a warning, hence an error, where a sample misses
    assert x.dtype == torch.float32
    assert deq.stats.converged.all()
    assert deq.stats.backward.converged.all()


@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), Unrolled(checkpoint=True)], ids=repr)
def test_autocast_forward_and_backward(adjoint):
    f = Block().float()
    u = torch.randn(3, 4, dtype=torch.float32, requires_grad=True)

    def gradient(enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), Monitor() as monitor:
            x = DEQ(f, adjoint=adjoint)(u)
        torch.autograd.backward(x.float().pow(2).sum())
        assert monitor.missed == 0.0
        found, u.grad = u.grad, None
        return x.dtype, found

    low, ours = gradient(True)
    full, exact = gradient(False)
    assert (low, full) == (torch.bfloat16, torch.float32)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < 0.05 * exact.norm()
