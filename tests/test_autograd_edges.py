"""The edges of autograd: rows without a history, operations in place around a solve, noise, threads, checkpoints."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from implicitdl import (
    DEQ,
    SHINE,
    Anderson,
    ArgumentError,
    Auto,
    Broyden,
    ImplicitAdjoint,
    ImplicitModel,
    Newton,
    PhantomGradient,
    Picard,
    Unrolled,
    fixed_point,
    root,
)
from implicitdl.nn import WarmStart
from precision import digits

by_solver = pytest.mark.parametrize("solver", [Auto(), Picard(), Anderson(), Broyden()], ids=lambda s: type(s).__name__)
ADJOINTS = [
    ImplicitAdjoint(),
    ImplicitAdjoint(order=2),
    Unrolled(),
    Unrolled(checkpoint=True),
    PhantomGradient(),
    SHINE(),
]


def gradients(deq: DEQ, layer: nn.Module, u: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad((deq(u) ** 2 + deq(u)).sum(), [u, *layer.parameters()]))


def agree(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    close = digits(1e-6, 1e-3)  # the derivative of the last iterate lags behind its value
    torch.testing.assert_close(ours, exact, rtol=close, atol=close)


@pytest.fixture
def layer():
    return nn.Linear(6, 6, bias=False)


@pytest.fixture
def u():
    u = torch.randn(5, 6)
    u[0] = 0
    return u.requires_grad_()


class TestUnrolledFromTheSolution:
    @by_solver
    @pytest.mark.parametrize("again", [False, True])
    def test_a_row_that_starts_there(self, layer, u, solver, again):
        def f(x, u):
            return torch.tanh(0.6 * layer(x) + u)

        unrolled = gradients(DEQ(f, solver=solver, adjoint=Unrolled(checkpoint=again)), layer, u)
        agree(unrolled, gradients(DEQ(f, solver=solver), layer, u))

    @by_solver
    def test_the_whole_batch_by_a_warm_start(self, layer, u, solver):
        def f(x, u):
            return torch.tanh(0.6 * layer(x) + u)

        deq = DEQ(f, solver=solver, adjoint=Unrolled(), x0=WarmStart())
        deq(u)
        agree(gradients(deq, layer, u), gradients(DEQ(f), layer, u))

    @by_solver
    def test_with_noise_in_f(self, layer, u, solver):
        def f(x, u):
            return torch.tanh(0.6 * F.dropout(layer(x), 0.2) + u)

        unrolled = gradients(DEQ(f, solver=solver, adjoint=Unrolled()), layer, u)
        agree(unrolled, gradients(DEQ(f), layer, u))

    def test_a_map_that_does_not_contract_there_is_an_error(self, u):
        with pytest.raises(ArgumentError, match=r"Unrolled: expected a map that contracts.*ImplicitAdjoint"):
            fixed_point(lambda x, u: -2 * x + u, torch.zeros(5, 6), u * 0, adjoint=Unrolled())


class TestInPlaceOnASolution:
    @pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
    @pytest.mark.parametrize(
        "change", [F.relu_, lambda x: x.add_(1), lambda x: x.clamp_(-0.1, 0.3), lambda x: x[:, 0].zero_()]
    )
    def test_is_as_on_any_tensor(self, layer, u, adjoint, change):
        def solved(u):
            return fixed_point(
                lambda x, u: torch.tanh(0.6 * layer(x) + u), torch.zeros(5, 6), u, solver=Broyden(), adjoint=adjoint
            ).value

        got = solved(u)
        change(got)
        expected = solved(u) + 0
        change(expected)
        weights = [u, layer.weight]
        grads = zip(torch.autograd.grad(got.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True)
        assert all(torch.equal(*pair) for pair in grads)

    def test_of_a_layer_behind_a_deq(self, layer, u):
        deq = DEQ(lambda x, u: torch.tanh(0.6 * layer(x) + u))
        nn.Sequential(deq, nn.ReLU(inplace=True))(u).sum().backward()
        assert torch.isfinite(u.grad).all()

    def test_of_a_root(self):
        a = torch.full((2, 1), 2.0, requires_grad=True)
        x = root(lambda x, a: 0.3 * (x * x - a), torch.ones(2, 1), a).value
        x *= 2
        x.sum().backward()
        torch.testing.assert_close(a.grad, torch.full((2, 1), 0.5**0.5), rtol=digits(1e-6, 1e-5), atol=0)

    def test_of_the_state_of_a_model(self):
        model, u = ImplicitModel(6, 3, 8), torch.randn(4, 6)
        x = model.solve(u).value
        x *= 2
        x.sum().backward()
        got, model.A.grad = model.A.grad, None
        (2 * model.solve(u).value).sum().backward()
        torch.testing.assert_close(got, model.A.grad)

    def test_of_gradients_with_a_graph(self, layer):
        u = torch.randn(5, 6, requires_grad=True)
        y = DEQ(lambda x, u: torch.tanh(0.6 * layer(x)) + u)(u)
        (g,) = torch.autograd.grad(y.sum(), u, create_graph=True)
        g.mul_(2)


class TestInPlaceInsideF:
    @pytest.mark.parametrize(
        "act",
        [nn.LeakyReLU(0.2, True), nn.ELU(inplace=True), nn.SiLU(True), nn.Hardswish(True), nn.ReLU(True)],
        ids=repr,
    )
    def test_on_the_data(self, layer, act):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), pytest.raises(ArgumentError, match=r"f to leave args\[0\] as it is"):
                fixed_point(lambda x, u: torch.tanh(0.4 * layer(x) + act(u)), torch.zeros(5, 6), torch.randn(5, 6))

    @pytest.mark.parametrize("solver", [Auto(), Newton(), Newton(dense=False), Broyden()], ids=repr)
    @pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), Unrolled()], ids=repr)
    def test_on_the_state(self, u, solver, adjoint):
        with pytest.raises(ArgumentError, match=r"f to leave "):
            fixed_point(lambda x, u: x.mul_(0.5) + u, torch.zeros(5, 6), u, solver=solver, adjoint=adjoint)

    def test_on_data_that_autograd_guards(self, u):
        with pytest.raises(ArgumentError, match=r"f to leave "):
            fixed_point(lambda x, u: 0.5 * x + F.relu_(u), torch.zeros(5, 6), u, adjoint=Unrolled())

    def test_by_numpy_which_no_version_counts(self):
        def f(x, u):
            u.numpy()[:] *= 0.5
            return 0.5 * x + u

        with pytest.raises(ArgumentError, match=r"f to leave args\[0\] as it is"):
            fixed_point(f, torch.zeros(5, 6), torch.randn(5, 6))

    def test_by_numpy_on_the_state(self):
        def f(x):
            x.numpy()[:] *= 0.5
            return x + 1

        with torch.no_grad(), pytest.raises(ArgumentError, match="f to leave its argument x as it is"):
            fixed_point(f, torch.ones(5, 6))

    def test_data_with_nan_is_no_change(self):
        mask = torch.tensor([[float("nan")], [1.0]])
        solution = fixed_point(lambda x, m: 0.5 * x + m.nan_to_num(), torch.zeros(2, 1), mask)
        assert solution.converged.all()


class TestNoiseInThreads:
    def test_gradients_belong_to_the_mask_of_their_solve(self):
        def solved(_):
            a = torch.ones(40, 1, requires_grad=True)
            x = fixed_point(lambda x, a: 0.5 * F.dropout(x, 0.5) * 0.9 + a, torch.zeros(40, 1), a).value
            return x.detach(), torch.autograd.grad(x.sum(), a)[0]

        with ThreadPoolExecutor(4) as pool:
            for x, g in pool.map(solved, range(24)):
                # x = 0.9 m x + a with m of 0 or 1: x = 1 or 10, and so is its derivative.
                torch.testing.assert_close(g, x, rtol=digits(1e-8, 1e-4), atol=0)

    def test_a_thread_that_draws_elsewhere_is_found(self, layer, u):
        count = iter(range(10**6))

        def f(x, u):
            if next(count) == 3:
                with ThreadPoolExecutor(1) as other:
                    other.submit(torch.rand, 3).result()
            return torch.tanh(0.6 * F.dropout(layer(x), 0.5) + u)

        with pytest.raises(ArgumentError, match="the same noise in every evaluation"):
            fixed_point(f, torch.zeros(5, 6), u)

    def test_one_that_draws_beside_a_map_without_noise_does_no_harm(self, layer, u):
        count = iter(range(10**6))

        def f(x, u):
            if next(count) == 0:
                with ThreadPoolExecutor(1) as other:
                    other.submit(torch.rand, 3).result()
            return torch.tanh(0.6 * layer(x) + u)

        assert fixed_point(f, torch.zeros(5, 6), u).converged.all()


# What torch itself says of one while the solve makes no graph.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another layer"])
@pytest.mark.parametrize("solver", [Auto(), Newton()], ids=repr)
def test_a_reentrant_checkpoint_in_f_is_worded(layer, u, beside, solver):
    def f(x, u):
        fx = checkpoint(lambda x: torch.tanh(0.4 * layer(x)), x, use_reentrant=True)
        return fx + (layer(u) if beside else u)

    with pytest.raises(ArgumentError, match="use_reentrant=False"):
        fixed_point(f, torch.zeros(5, 6), u, solver=solver).value.sum().backward()
