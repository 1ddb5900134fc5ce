"""Constraints: membership, round trip, gradients inside, outside and on the boundary, parametrize."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parametrize

from implicitdl import ArgumentError
from implicitdl.constraints import (
    LowRank,
    RowProjection,
    RowScaling,
    SoftRowScaling,
    StrictlyUpper,
)
from implicitdl.testing import CONSTRAINTS, check_constraint

BALLS = [RowScaling(kappa=0.9), RowProjection(kappa=0.9), SoftRowScaling(kappa=0.9)]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
def test_constraint(constraint):
    for size in (0.05, 0.5, 15.6):  # inside, across and outside
        shapes = [(6, 2), (6, 2)] if isinstance(constraint, LowRank) else [(6, 6)]
        *others, last = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
        check_constraint(constraint, (*others, last * size))


def reference_projection(v: torch.Tensor, radius: float) -> torch.Tensor:
    """By sorting, one row at a time."""
    if v.abs().sum() <= radius:
        return v
    ordered = v.abs().sort(descending=True).values
    theta = ((ordered.cumsum(0) - radius) / torch.arange(1, len(v) + 1)).max()
    return v.sign() * (v.abs() - theta).clamp(min=0)


@pytest.mark.float64
@given(
    st.integers(1, 12), st.integers(1, 30), st.floats(-6, 6), st.floats(0.05, 0.99), st.integers(0, 2**31),
)  # fmt: skip
def test_projection_is_that_of_sorting(rows, columns, log_size, kappa, seed):
    v = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**log_size
    v[torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) < 0.2] = 0.0
    A = RowProjection(kappa=kappa)(v)
    expected = torch.stack([reference_projection(row, kappa) for row in v])
    assert torch.allclose(A, expected, rtol=1e-9, atol=1e-12 * 10 ** max(log_size, 0))
    assert RowProjection(kappa=kappa).contains(A)


@given(st.integers(1, 40), st.floats(-3, 3), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31))
def test_balls_contain_their_images_in_every_dtype(n, log_size, dtype, seed):
    v = (torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) * 10**log_size).to(dtype)
    for ball in BALLS:
        assert ball.contains(ball(v))


@pytest.mark.float64
@pytest.mark.parametrize("constraint", [RowScaling(kappa=0.9), RowProjection(kappa=0.9)], ids=repr)
def test_on_the_boundary_the_gradient_is_a_one_sided_derivative(constraint):
    v = torch.randn(1, 5)
    v = v * (0.9 / v.abs().sum())
    while v.abs().sum() > 0.9:  # rounding may leave it a hair outside
        v = v * (1 - 1e-16)
    weights, eps = torch.randn(5), 1e-7

    def value(v):
        return float((constraint(v) * weights).sum())

    free = v.clone().requires_grad_()
    (constraint(free) * weights).sum().backward()
    for direction in (v.sign(), -v.sign(), *torch.randn(20, 1, 5)):
        forward = (value(v + eps * direction) - value(v)) / eps
        backward = (value(v) - value(v - eps * direction)) / eps
        ours = float((free.grad * direction).sum())
        assert min(abs(ours - forward), abs(ours - backward)) < 1e-5


@pytest.mark.parametrize("constraint", BALLS, ids=repr)
def test_zero_rows_have_finite_gradients(constraint):
    raw = torch.randn(4, 4) * 5
    raw[1] = 0.0
    raw.requires_grad_()
    constraint(raw).pow(2).sum().backward()
    assert torch.isfinite(raw.grad).all()


def test_scaling_touches_no_row_that_is_inside():
    raw = torch.randn(5, 5) * 0.1
    raw[2] *= 100
    for ball in (RowScaling(kappa=0.9), RowProjection(kappa=0.9)):
        A = ball(raw)
        assert torch.equal(A[[0, 1, 3, 4]], raw[[0, 1, 3, 4]])
        assert torch.allclose(A[2].abs().sum(), torch.tensor(0.9))


@pytest.mark.parametrize("constraint", BALLS, ids=repr)
@pytest.mark.parametrize("kappa", [0.9, 0.99, 0.7])
def test_float32_gradients_are_those_of_float64(constraint, kappa):
    # Whether a row is inside must not be read off a quotient that rounds to nearly 1.
    ball = type(constraint)(kappa=kappa)
    raw, weights = torch.randn(2, 200, 10, dtype=torch.float64)
    raw = raw / 8

    def gradient(dtype):
        free = raw.to(dtype).requires_grad_()
        (ball(free) * weights.to(dtype)).sum().backward()
        return free.grad.double()

    assert torch.allclose(gradient(torch.float32), gradient(torch.float64), atol=1e-5)


def test_the_radius_is_kappa_over_the_slope():
    A = RowScaling(kappa=0.9, lipschitz=1.1)(torch.randn(8, 8) * 10)
    assert torch.allclose(A.abs().sum(dim=1), torch.tensor(0.9 / 1.1))


def test_row_norms_of_a_low_rank_product_are_exact_not_bounded():
    L, R = torch.randn(30, 3) * 3, torch.randn(30, 3)
    A = LowRank(kappa=0.9)(L, R)
    assert torch.allclose(A.abs().sum(dim=1), torch.full((30,), 0.9))


def test_low_rank_in_blocks_equals_one_block(monkeypatch):
    from implicitdl.constraints import structure

    L, R = torch.randn(10, 2, requires_grad=True), torch.randn(10, 2, requires_grad=True)
    weights = torch.randn(10, 10)

    def value_and_gradient():
        A = LowRank(kappa=0.9)(L, R)
        return A, *torch.autograd.grad((A * weights).sum(), (L, R))

    whole = value_and_gradient()
    monkeypatch.setattr(structure, "_BLOCK_ENTRIES", 30)
    for one, other in zip(whole, value_and_gradient(), strict=True):
        assert torch.allclose(one, other)


@pytest.mark.parametrize("constraint", [*BALLS, StrictlyUpper()], ids=repr)
def test_parametrize_on_a_users_own_module_keeps_the_promise_after_every_step(constraint):
    layer = torch.nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(constraint(layer.weight * 0.1))
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", constraint)
    assert torch.allclose(layer.weight, before)
    optimiser = torch.optim.SGD(layer.parameters(), lr=10.0)
    for _ in range(5):
        optimiser.zero_grad()
        layer(torch.randn(3, 6)).pow(2).sum().neg().backward()
        optimiser.step()
        assert constraint.contains(layer.weight.detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RowScaling(kappa=1.0), "kappa strictly between 0 and 1, got 1.0"),
        (lambda: RowScaling(kappa=0), "kappa strictly between 0 and 1, got 0"),
        (lambda: RowScaling(lipschitz=float("inf")), r"finite, nonzero max\|φ'\|, got inf"),
        (lambda: RowScaling(kappa=0.5).right_inverse(torch.eye(2)), r"‖A‖∞ ≤ 0.5\), got ‖A‖∞ = 1"),
        (lambda: StrictlyUpper().right_inverse(torch.eye(2)), "got 2 nonzeros on or below the diagonal"),
        (lambda: LowRank().right_inverse(torch.zeros(2, 2)), "expected a rank, got None"),
        (lambda: LowRank(rank=1).right_inverse(torch.eye(3) / 2), "A of rank at most 1, got σ_2 = 0.5"),
    ],
)
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
