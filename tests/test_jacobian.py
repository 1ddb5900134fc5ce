"""The spectral radius on Jacobians of every kind, and Jacobian regularisation against the Jacobian itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from implicitdl import (
    DEQ,
    ArgumentError,
    Equilibrium,
    ImplicitFunctionWarning,
    Picard,
    fixed_point,
    jacobian_regularization,
    spectral_radius,
)
from implicitdl.nn import JacobianPenalty, TanhBlock

TURN = 0.9 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def linear(A: torch.Tensor):
    return lambda x: x @ A.t()


def radius(A: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvals(A).abs().max()


def padded(A: torch.Tensor, size: int) -> torch.Tensor:
    """A beside a random block of a third of its radius; from 128 on J is too large to be formed."""
    rest = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=A.dtype)
    return torch.block_diag(A, float(radius(A)) / (3 * float(radius(rest))) * rest)


class TestSpectralRadius:
    @pytest.mark.float64
    @pytest.mark.parametrize("size", [20, 150], ids=["formed", "Arnoldi"])
    @pytest.mark.parametrize(
        "A",
        [
            TURN,
            torch.block_diag(TURN, -TURN, 0.5 * TURN),
            torch.tensor([[0.5, 100.0], [0.0, -0.4]], dtype=torch.float64),
            torch.diag(torch.tensor([-0.8, 0.8, 0.3], dtype=torch.float64)),
            torch.tensor([[3.0]], dtype=torch.float64),
        ],
        ids=["complex pair", "two pairs of one modulus", "non-normal", "both signs", "expanding"],
    )
    def test_known_jacobians(self, A, size):
        A = padded(A, size)
        found = spectral_radius(linear(A), torch.randn(3, len(A)), rtol=1e-6)
        assert torch.allclose(found.value, radius(A).expand(3), rtol=1e-6)
        assert found.converged.all()

    @pytest.mark.parametrize("d", [3, 400], ids=["formed", "Arnoldi"])
    def test_a_zero_jacobian_has_radius_zero(self, d):
        for f in (lambda x: 0 * x, lambda x: torch.ones_like(x)):
            found = spectral_radius(f, torch.randn(2, d))
            assert found.value.tolist() == [0.0, 0.0]
            assert found.converged.all()

    def test_a_nilpotent_jacobian_has_radius_zero_exactly(self):
        A = 100 * torch.randn(100, 100).triu(1)
        assert spectral_radius(linear(A), torch.zeros(1, 100)).value.item() == 0.0

    @given(st.integers(1, 40), st.integers(0, 2**31))
    def test_random_jacobians_formed_and_not(self, d, seed):
        A = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(spectral_radius(linear(A), torch.zeros(1, d)).value, radius(A))
        big = torch.block_diag(A, torch.zeros(40, 40))
        found = spectral_radius(linear(big), torch.zeros(1, d + 40), rtol=1e-9, dimension=d + 39)
        assert torch.allclose(found.value, radius(A), rtol=1e-5)

    @pytest.mark.float64
    def test_each_sample_has_its_own_jacobian_and_its_batch_does_not_matter(self):
        A, scale = padded(TURN, 150), torch.tensor([[0.1], [1.0], [7.0]])
        x = torch.randn(3, len(A))

        def f(x, scale):
            return scale * torch.tanh(x) @ A.t()

        together = spectral_radius(f, x, scale, rtol=1e-3)
        for i in range(3):
            J = scale[i] * A * (1 - torch.tanh(x[i]) ** 2)
            assert torch.allclose(together.value[i], radius(J), rtol=1e-2)
            alone = spectral_radius(f, x[i : i + 1], scale[i : i + 1], rtol=1e-3)
            assert torch.allclose(alone.value[0], together.value[i], rtol=1e-9)

    def test_it_is_the_rate_of_plain_iteration(self):
        A, b = 0.8 * torch.linalg.qr(torch.randn(20, 20))[0], torch.randn(1, 20)
        f = Equilibrium(A, b)
        solution = fixed_point(f, torch.zeros(1, 20), solver=Picard(max_steps=2000), trace=True)
        last = solution.trace[-60:-10, 0]
        rate = float((last[-1] / last[0]) ** (1 / (len(last) - 1)))
        assert abs(float(spectral_radius(f, solution.value).value) - rate) < 0.05

    def test_a_radius_that_has_not_settled_is_loud_and_says_how_far_it_is(self):
        Q = torch.linalg.qr(torch.randn(300, 300))[0]
        with pytest.warns(ImplicitFunctionWarning, match=r"2 of 2 samples did not reach rtol=1e-06 in 16 products"):
            found = spectral_radius(linear(Q), torch.zeros(2, 300), rtol=1e-6, dimension=16)
        assert not found.converged.any()
        assert (abs(found.value - 1) <= found.residual * found.value).all(), "for a normal J the residual is a bound"

    @pytest.mark.parametrize("d", [2, 200])
    def test_a_sample_that_is_not_finite_is_reported_and_spares_the_others(self, d):
        x = torch.full((2, d), 2.0)
        x[0, 0] = torch.nan
        with pytest.warns(ImplicitFunctionWarning, match="1 of 2 samples"):
            found = spectral_radius(lambda x: 0.25 * x * x, x)
        assert found.value.isnan().tolist() == [True, False]
        assert found.converged.tolist() == [False, True]
        assert abs(float(found.value[1]) - 1) < 1e-6

    def test_states_of_any_shape_tuples_and_lower_precision(self):
        image = spectral_radius(lambda x: -0.5 * x.flip(2), torch.zeros(2, 3, 4, 5))
        assert torch.allclose(image.value, torch.full((2,), 0.5))
        pair = spectral_radius(lambda x: (x[1].sum(1, keepdim=True), 0.1 * x[0].expand(-1, 4)),
                               (torch.zeros(2, 1), torch.zeros(2, 4)))  # fmt: skip
        assert torch.allclose(pair.value, torch.full((2,), 0.4**0.5))
        half = spectral_radius(lambda x: 0.5 * x, torch.zeros(1, 200, dtype=torch.bfloat16))
        assert abs(float(half.value) - 0.5) < 1e-3

    def test_it_leaves_no_graph(self):
        weight = torch.randn(3, 3, requires_grad=True)
        found = spectral_radius(lambda x: x @ weight, torch.zeros(1, 3, requires_grad=True))
        assert not found.value.requires_grad


class TestRegularization:
    def test_it_is_unbiased(self):
        A, x = torch.randn(4, 4), torch.randn(5, 4)
        g = torch.Generator().manual_seed(0)
        exact = torch.stack([(A * (1 - torch.tanh(row @ A.t()) ** 2).unsqueeze(1)).square().sum() for row in x]) / 4
        draws = torch.stack(
            [jacobian_regularization(lambda x: torch.tanh(x @ A.t()), x, generator=g) for _ in range(4000)]
        )
        error = draws.std() / len(draws) ** 0.5
        assert abs(draws.mean() - exact.mean()) < 4 * error
        assert error < 0.02 * exact.mean()

    def test_many_samples_are_the_mean_of_single_ones(self):
        A, x = torch.randn(3, 3), torch.randn(2, 3)
        one = torch.Generator().manual_seed(1)
        each = [jacobian_regularization(linear(A), x, generator=one) for _ in range(3)]
        together = jacobian_regularization(linear(A), x, samples=3, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(together, torch.stack(each).mean())

    def test_signs_are_exact_where_the_jacobian_is_diagonal(self):
        scale = torch.tensor([1.0, 2.0, 3.0])
        value = jacobian_regularization(lambda x: scale * x, torch.zeros(2, 3))
        assert torch.allclose(value, scale.square().mean())

    @pytest.mark.float64
    def test_its_gradient_is_right_in_weights_arguments_and_the_point(self):
        def value(weight, x, u):
            f = lambda x, u: torch.tanh(x @ weight + u)  # noqa: E731
            return jacobian_regularization(f, x, u, samples=2, generator=torch.Generator().manual_seed(2))

        inputs = tuple(torch.randn(*shape, requires_grad=True) for shape in ((3, 3), (2, 3), (2, 3)))
        assert torch.autograd.gradcheck(value, inputs, fast_mode=True)

    def test_through_a_solution_and_beside_it(self):
        # One dimension: J(w, x) = w (1 − tanh²(wx + u)), and x* moves with w.
        w, u = torch.tensor(0.7, requires_grad=True), torch.tensor([[0.3]])

        def f(x):
            return torch.tanh(w * x + u)

        def square(w, x):
            return (w * (1 - torch.tanh(w * x + u) ** 2)).square().sum()

        x = fixed_point(f, torch.zeros(1, 1), on_failure="raise").value
        (moved,) = torch.autograd.grad(x, w, retain_graph=True)
        along_w, along_x = torch.autograd.grad(square(w, point := x.detach().requires_grad_()), (w, point))
        (beside,) = torch.autograd.grad(jacobian_regularization(f, x.detach()), w)
        (through,) = torch.autograd.grad(jacobian_regularization(f, x), w)
        assert torch.allclose(beside, along_w)
        assert torch.allclose(through, along_w + along_x.squeeze() * moved)
        assert not torch.isclose(beside, through)

    def test_a_training_run_with_it_has_a_smaller_jacobian(self):
        def trained(weight_of_penalty):
            torch.manual_seed(0)
            layer, u = nn.Linear(10, 10), torch.randn(32, 10)
            optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
            f = lambda x: torch.tanh(layer(x) + u)  # noqa: E731
            for _ in range(40):
                x = fixed_point(f, torch.zeros(32, 10), on_failure="raise").value
                loss = (x - u.roll(1, 1)).square().mean() + weight_of_penalty * jacobian_regularization(f, x)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            return spectral_radius(f, x.detach()).value.mean()

        assert trained(1.0) < 0.8 * trained(0.0)

    def test_zero_jacobian(self):
        weight = torch.ones(3, requires_grad=True)
        value = jacobian_regularization(lambda x: weight.expand(2, 3), torch.zeros(2, 3))
        assert value.item() == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectral_radius(lambda x: x, torch.zeros(1, 2), rtol=0.0), "strictly between 0 and 1"),
        (lambda: spectral_radius(lambda x: x, torch.zeros(1, 2), dimension=0), "dimension to be a positive integer"),
        (lambda: spectral_radius(lambda x: x[:, :1], torch.zeros(1, 2)), "spectral_radius: expected f to return shape"),
        (lambda: jacobian_regularization(lambda x: x, torch.zeros(1, 2), samples=0), "samples to be a positive integer"),
    ],
)  # fmt: skip
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize("figure", [jacobian_regularization, spectral_radius])
@pytest.mark.parametrize(
    ("arg", "got"), [(torch.zeros(2, 4), r"\(2, 4\)"), (torch.tensor(1.0), r"\(\)"), (0.5, "float")]
)
def test_args_of_another_batch_are_worded(figure, arg, got):
    with pytest.raises(ArgumentError, match=rf"args to be tensors of shape \(batch=3, ...\), as x has it, got {got}"):
        figure(lambda x, u: torch.tanh(x + u), torch.zeros(3, 4), arg)


class TestPenalty:
    def test_it_is_the_regularization_at_the_solution(self):
        deq, u = DEQ(TanhBlock(4)), torch.randn(6, 4)
        penalty = JacobianPenalty(deq, 0.25)
        torch.manual_seed(1)
        x = deq(u)
        torch.manual_seed(1)
        expected = 0.25 * jacobian_regularization(deq.f, x.detach(), u)
        found = penalty()
        torch.testing.assert_close(found, expected)
        weight = deq.f.linear.weight
        torch.testing.assert_close(*(torch.autograd.grad(term, weight)[0] for term in (found, expected)))
        assert penalty() == 0

    def test_it_adds_up_passes_in_training_and_no_others(self):
        deq, u = DEQ(lambda x, u, v: 0.5 * x + u * v), torch.ones(2, 3)
        penalty = JacobianPenalty(deq, 1.0, samples=2)
        deq(u, u), deq((u, u))
        torch.testing.assert_close(penalty(), torch.tensor(0.5))
        with torch.no_grad():
            deq(u, u)
        deq.eval()(u, u)
        assert penalty() == 0
        penalty.remove()
        deq.train()(u, u)
        assert penalty() == 0

    def test_training_with_it_makes_the_jacobian_smaller(self):
        deq, u = DEQ(TanhBlock(4)), torch.randn(6, 4)
        penalty, optimiser = JacobianPenalty(deq, 1.0), torch.optim.SGD(deq.parameters(), lr=0.5)
        before = torch.linalg.matrix_norm(deq.f.linear.weight.detach())
        for _ in range(20):
            optimiser.zero_grad()
            deq(u)
            penalty().backward()
            optimiser.step()
        assert torch.linalg.matrix_norm(deq.f.linear.weight.detach()) < 0.5 * before

    def test_bad_weights_are_worded(self):
        with pytest.raises(ArgumentError, match="JacobianPenalty: expected weight to be a positive finite number"):
            JacobianPenalty(DEQ(TanhBlock(2)), 0.0)
