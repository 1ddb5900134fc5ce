"""Weight and spectral normalisation: the bound after every step, against the exact operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from implicitdl import DEQ, ArgumentError, Picard
from implicitdl.constraints import SpectralNorm, WeightNorm
from implicitdl.testing import check_constraint


def norm(op, shape: tuple[int, ...]) -> float:
    """‖·‖₂ of a linear map of images, from its matrix."""
    unit = torch.eye(torch.Size(shape).numel()).view(-1, *shape)
    return float(torch.linalg.matrix_norm(op(unit).flatten(1), 2))


def padded(layer: nn.Conv2d, weight: torch.Tensor):
    """The layer with another weight and no bias."""

    def op(x):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        return F.conv2d(x, weight, stride=layer.stride, dilation=layer.dilation, groups=layer.groups)

    return op


def steps(layer: nn.Module, inputs: torch.Tensor):
    """The layer after each of some large steps of SGD that drive its weight outwards."""
    optimiser = torch.optim.SGD(layer.parameters(), lr=10.0)
    for _ in range(8):
        optimiser.zero_grad()
        (-layer(inputs).square().mean()).backward()
        optimiser.step()
        yield layer.weight.detach()


class TestSpectralNorm:
    @pytest.mark.float64
    def test_a_linear_layer_keeps_the_exact_bound_after_every_step(self):
        layer = parametrize.register_parametrization(nn.Linear(12, 7), "weight", SpectralNorm(kappa=0.9))
        for weight in steps(layer, torch.randn(5, 12)):
            assert float(torch.linalg.matrix_norm(weight, 2)) <= 0.9 * (1 + 1e-14)
        assert torch.linalg.matrix_norm(layer.parametrizations.weight.original.detach(), 2) > 1.37

    @pytest.mark.parametrize(
        "options",
        [
            {"padding": 1},
            {"padding": 1, "padding_mode": "circular"},
            {"padding": 1, "stride": 2},
            {"padding": 2, "dilation": 2},
            {"padding": 2, "dilation": 2, "padding_mode": "circular"},
            {"groups": 2},
        ],
        ids=repr,
    )
    def test_a_convolution_of_any_kind_keeps_the_bound_without_a_size(self, options):
        layer = nn.Conv2d(4, 4, 3, **options)
        parametrize.register_parametrization(layer, "weight", SpectralNorm(kappa=0.9))
        for weight in steps(layer, torch.randn(2, 4, 6, 7)):
            assert norm(padded(layer, weight), (4, 6, 7)) <= 0.9 * (1 + 1e-13)

    @pytest.mark.float64
    @pytest.mark.parametrize("size", [(4, 4), (5, 6), (7, 3)])
    @pytest.mark.parametrize(("mode", "upper"), [("zeros", 1.35), ("circular", 1.0)])
    def test_with_a_size_it_is_the_norm_of_the_operator_or_close_above(self, mode, upper, size):
        layer = nn.Conv2d(3, 5, 3, padding=1, padding_mode=mode)
        constraint = SpectralNorm(kappa=0.9, size=size, padding_mode=mode)
        sigma = float(constraint.sigma(layer.weight.detach()))
        exact = norm(padded(layer, layer.weight.detach()), (3, *size))
        assert exact * (1 - 1e-12) <= sigma <= exact * upper * (1 + 1e-12)
        assert sigma < float(SpectralNorm().sigma(layer.weight.detach()))
        parametrize.register_parametrization(layer, "weight", constraint)
        for weight in steps(layer, torch.randn(2, 3, *size)):
            assert norm(padded(layer, weight), (3, *size)) <= 0.9 * (1 + 1e-13)

    def test_one_dimensional_kernels(self):
        layer = parametrize.register_parametrization(nn.Conv1d(2, 3, 4, padding=2), "weight", SpectralNorm(kappa=0.5))
        for weight in steps(layer, torch.randn(2, 2, 9)):
            assert norm(lambda x, w=weight: F.conv1d(x, w, padding=2), (2, 9)) <= 0.5 * (1 + 1e-13)

    def test_inside_the_ball_a_weight_is_its_own(self):
        raw = torch.randn(4, 4)
        raw /= 2 * torch.linalg.matrix_norm(raw, 2)
        assert torch.equal(SpectralNorm(kappa=0.9)(raw), raw)

    @pytest.mark.float64
    def test_the_radius_is_kappa_over_the_slope(self):
        W = SpectralNorm(kappa=0.9, lipschitz=1.1)(10 * torch.randn(5, 5))
        assert abs(float(torch.linalg.matrix_norm(W, 2)) - 0.9 / 1.1) < 1e-12

    @given(st.integers(1, 30), st.integers(1, 30), st.floats(-6, 6), st.sampled_from([torch.float32, torch.float64]))
    def test_it_contains_its_images_in_every_shape_and_dtype(self, rows, columns, log_size, dtype):
        raw = (torch.randn(rows, columns) * 10**log_size).to(dtype)
        W = SpectralNorm(kappa=0.9)(raw)
        assert SpectralNorm(kappa=0.9).contains(W)
        slack = 1 + 10 * max(rows, columns) * torch.finfo(dtype).eps
        assert float(torch.linalg.matrix_norm(W.double(), 2)) <= 0.9 * slack

    def test_gradients_of_kernels(self):
        raw = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        for constraint in (SpectralNorm(kappa=0.9), SpectralNorm(kappa=0.9, size=(4, 5))):
            assert torch.autograd.gradcheck(constraint, raw, fast_mode=True)

    def test_zero_has_a_finite_gradient(self):
        raw = torch.zeros(3, 3, requires_grad=True)
        (SpectralNorm(kappa=0.9)(raw) * torch.randn(3, 3)).sum().backward()
        assert torch.isfinite(raw.grad).all()

    def test_it_makes_a_deq_a_contraction(self):
        layer = nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            layer.weight.mul_(20)
        parametrize.register_parametrization(layer, "weight", SpectralNorm(kappa=0.9, size=(5, 5)))
        deq = DEQ(lambda x, u: torch.relu(layer(x) + u), solver=Picard(max_steps=500), on_failure="raise")
        deq(torch.randn(2, 3, 5, 5)).sum().backward()
        assert deq.stats.converged.all()


class TestWeightNorm:
    @pytest.mark.parametrize("size", [0.05, 0.5, 15.6])
    def test_as_a_constraint(self, size):
        check_constraint(
            WeightNorm(bound=2.0),
            (size * torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)),
        )

    @pytest.mark.parametrize(
        ("kind", "sizes", "shape"), [(nn.Linear, (6, 4), (3, 6)), (nn.Conv2d, (6, 4, 3), (3, 6, 4, 4))]
    )
    def test_rows_stay_below_the_bound_after_every_step(self, kind, sizes, shape):
        layer = parametrize.register_parametrization(kind(*sizes), "weight", WeightNorm(bound=1.5))
        for weight in steps(layer, torch.randn(shape)):
            assert float(weight.flatten(1).norm(dim=1).max()) <= 1.5 * (1 + 1e-14)

    def test_registering_keeps_a_weight_inside_the_set_and_its_function(self):
        layer = nn.Linear(6, 4)
        before = layer.weight.detach().clone()
        parametrize.register_parametrization(layer, "weight", WeightNorm(bound=2.0))
        assert torch.allclose(layer.weight, before)

    def test_a_row_that_is_too_long_starts_below_the_bound_in_its_direction(self):
        weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        layer = nn.Linear(2, 2)
        with torch.no_grad():
            layer.weight.copy_(weight)
        parametrize.register_parametrization(layer, "weight", WeightNorm(bound=1.0))
        assert torch.allclose(layer.weight, torch.tensor([[0.54, 0.72], [0.3, 0.4]]))

    @pytest.mark.float64
    def test_length_and_direction_are_learned_apart(self):
        v, g = torch.randn(3, 5, requires_grad=True), torch.randn(3, 1)
        W = WeightNorm(bound=1.0)(v, g)
        assert torch.allclose(W.norm(dim=1, keepdim=True), torch.sigmoid(g))
        (W * torch.randn(3, 5)).sum().backward()
        assert torch.allclose((v.grad * v.detach()).sum(dim=1), torch.zeros(3), atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectralNorm(kappa=1.5), "kappa strictly between 0 and 1, got 1.5"),
        (lambda: SpectralNorm(size=(3, 0)), "size to be a positive integer, got 0"),
        (lambda: SpectralNorm(padding_mode="reflect"), "padding_mode to be one of zeros, circular, got 'reflect'"),
        (lambda: SpectralNorm(size=(3, 3))(torch.ones(2, 2, 3)), r"\(C_out, C_in, k₁, k₂\), since size is given"),
        (lambda: WeightNorm(bound=0), "bound to be a positive finite number, got 0"),
        (lambda: WeightNorm().right_inverse(torch.eye(3)[:2] * 0), "rows that are not zero, got 2 zero rows"),
    ],
)
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
