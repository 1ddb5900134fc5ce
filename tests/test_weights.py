"""Rows that are shrunk on the way of the solve: the same numbers, gradients and errors as of a matrix made before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from implicitdl import ArgumentError, Auto, Equilibrium, ImplicitAdjoint, ImplicitModel, Unrolled, fixed_point
from implicitdl.activations import HARDTANH, LEAKY_RELU, RELU
from implicitdl.constraints import RowScaling
from implicitdl.equations.scaling import scale_rows
from implicitdl.kernels import build, loops
from kernel_paths import threads, torch_alone

needs_c = pytest.mark.skipif(build.library(torch.float64) is None, reason="no C compiler")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SETTINGS = (1e-5, 0.0, 200, 2, 0.5, 100)


def raw(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows inside the ball of radius 1, outside of it, and one of zeros."""
    v = torch.randn(n, n, dtype=dtype) * torch.linspace(0, 4, n, dtype=dtype)[:, None] / n
    return v[torch.randperm(n)]


@pytest.mark.compiled
@needs_c
@BOTH
@pytest.mark.parametrize("count", [1, 2])
def test_the_loop_makes_what_the_scaling_makes(count, dtype):
    for n in (1, 2, 7, 16, 17, 33, 48, 49, 64, 100, 113):
        scaled_on_the_way(n, count, dtype)


def scaled_on_the_way(n, count, dtype):
    v, b = raw(n, dtype), torch.randn(5, n, dtype=dtype)
    with threads(count):
        made, scale = loops.scale_rows(v, 0.9)
        before = loops.sweeps(made, None, b, None, RELU.compiled, None, *SETTINGS)
        on_the_way = loops.sweeps(v, 0.9, b, None, RELU.compiled, None, *SETTINGS)
        strided = loops.sweeps(v.t().contiguous().t(), 0.9, b, None, RELU.compiled, None, *SETTINGS)
    for found in (on_the_way, strided):
        assert torch.equal(found.scaled[0], made)
        assert torch.equal(found.scaled[1], scale)
        assert found.unsolved == before.unsolved == 0
        assert torch.equal(found.x, before.x)
        assert torch.equal(found.slope, before.slope)
        assert torch.equal(found.stats.residual, before.stats.residual)
        assert torch.equal(found.stats.steps, before.stats.steps)
    assert before.scaled is None


@pytest.mark.compiled
@needs_c
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_solves_nothing_in_silence(bad):
    v = raw(20)
    v[3, 4] = bad
    b = torch.randn(6, 20, dtype=torch.float64)
    f = Equilibrium(v, b, radius=0.9)
    with pytest.raises(ArgumentError, match="expected finite A"):
        fixed_point(f, None, on_failure="ignore")


def gradients(A: Tensor, b: Tensor, phi, lazily: bool, **options: object) -> list[Tensor]:
    v, b = A.clone().requires_grad_(), b.clone().requires_grad_()
    f = Equilibrium(v, b, phi, radius=0.95) if lazily else Equilibrium(scale_rows(v, 0.95), b, phi)
    x = fixed_point(f, None, **options).value
    (x * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)).sum().backward()
    return [x.detach(), v.grad, b.grad]


@pytest.mark.parametrize(
    ("options", "phi"),
    [
        ({}, RELU), ({}, LEAKY_RELU), ({}, HARDTANH), ({"adjoint": ImplicitAdjoint(order=2)}, LEAKY_RELU),
        ({"adjoint": Unrolled(), "solver": Auto(rtol=1e-8)}, HARDTANH), ({"trace": True}, RELU),
        ({"solver": Auto(max_steps=400, rtol=1e-13)}, LEAKY_RELU),
    ],
    ids=["exact", "exact, leaky", "exact, hardtanh", "order 2", "unrolled", "trace", "to the last digit"],
)  # fmt: skip
@pytest.mark.parametrize("alone", [False, True], ids=["compiled", "torch alone"])
def test_values_and_gradients_are_those_of_a_matrix_made_before(phi, options, alone):
    A, b = raw(24), torch.randn(9, 24, dtype=torch.float64)
    expected = gradients(A, b, phi, False, **options)
    if alone:
        with torch_alone():
            found = gradients(A, b, phi, True, **options)
    else:
        found = gradients(A, b, phi, True, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_rows_that_the_loop_leaves_to_the_next_stage():
    """A rotation of nearly full length, on which plain steps and Aitken's are slow."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    A = torch.block_diag(*[turn] * 12)
    b = torch.rand(7, 24, dtype=torch.float64) + 0.5
    expected = gradients(A, b, LEAKY_RELU, False)
    for ours, theirs in zip(gradients(A, b, LEAKY_RELU, True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_the_graph_is_there_whoever_asks_first():
    f = Equilibrium(raw(6).requires_grad_(), torch.zeros(1, 6, dtype=torch.float64), radius=0.9)
    with torch.no_grad():
        first = f.numbers
    assert not first.requires_grad
    assert f.A.requires_grad
    assert torch.equal(first, f.A)


def model() -> ImplicitModel:
    torch.manual_seed(0)
    made = ImplicitModel(input_dim=5, output_dim=3, hidden_dim=18, dtype=torch.float64)
    with torch.no_grad():
        made.A.mul_(6)
    return made


def test_a_change_in_place_before_backward_is_an_error():
    ours = model()
    y = ours(torch.randn(4, 5, dtype=torch.float64)).sum()
    with torch.no_grad():
        ours.A.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_second_derivative_is_refused_by_the_first_order():
    ours = model()
    y = ours(torch.randn(4, 5, dtype=torch.float64)).square().sum()
    (g,) = torch.autograd.grad(y, ours.A, create_graph=True)
    with pytest.raises(RuntimeError, match="order=2"):
        g.square().sum().backward()


def test_the_constraint_is_the_users_to_watch_and_to_change():
    u = torch.randn(4, 5, dtype=torch.float64)
    ours, seen = model(), []
    plain = ours(u)
    ours.constraint.register_forward_hook(lambda module, inputs, A: seen.append(A))
    assert torch.equal(ours(u), plain)
    assert len(seen) == 1

    class Halved(RowScaling):
        def forward(self, raw: Tensor) -> Tensor:
            return super().forward(raw) / 2

    halved = model()
    halved.constraint = Halved()
    with torch.no_grad():
        expected = fixed_point(Equilibrium(halved.weights()[0], u @ halved.B.t()), None).value
        assert torch.equal(halved.solve(u).value, expected)
        assert not torch.allclose(halved.solve(u).value, model().solve(u).value)


def test_autocast_scales_before_it_rounds():
    v, b = raw(20, torch.float32), torch.randn(4, 20, dtype=torch.bfloat16)
    rounded = scale_rows(v, 0.9).bfloat16()
    assert torch.equal(Equilibrium(v, b, radius=0.9).A, rounded)
    assert not torch.equal(scale_rows(v.bfloat16(), 0.9), rounded)


@pytest.mark.parametrize("n", [18, 200], ids=["compiled product", "torch's product"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_that_is_converted_between_forward_and_backward(n, dtype):
    """Its parameters then hold other numbers, in memory of another size; the gradient is that of those it solved with."""
    torch.manual_seed(0)
    ours = ImplicitModel(input_dim=5, output_dim=3, hidden_dim=n, dtype=torch.float32)
    with torch.no_grad():
        ours.A.mul_(6)
    u = torch.randn(64, 5, dtype=torch.float32)
    (expected,) = torch.autograd.grad(ours(u).sum(), ours.A)
    y = ours(u).sum()
    ours.to(dtype)
    y.backward()
    torch.testing.assert_close(ours.A.grad, expected)
