"""Every code idea of the notebook on deep implicit layers (chapters 1 and 4), on the library's pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.autograd import gradcheck

from implicitdl import DEQ, Anderson, ImplicitAdjoint, Monitor, Picard, Unrolled, fixed_point, viz
from implicitdl.data import load
from implicitdl.nn import ConvEquilibriumClassifier, DenseEquilibriumClassifier, ResidualBlock, TanhBlock
from implicitdl.solvers import Newton
from precision import digits
from standins import write_mnist

TANH_LAYERS = {
    "fixed point": {"solver": Picard(), "adjoint": Unrolled()},
    "Newton": {"solver": Newton(), "adjoint": Unrolled()},
    "Newton, implicit": {"solver": Newton(), "adjoint": ImplicitAdjoint()},
}


class TestTanhLayers:
    @pytest.mark.parametrize("layer", TANH_LAYERS)
    def test_it_solves_the_equation(self, layer):
        f, u = TanhBlock(50), torch.randn(10, 50)
        deq = DEQ(f, **TANH_LAYERS[layer])
        x = deq(u)
        assert deq.stats.converged.all()
        assert torch.allclose(torch.tanh(f.linear(x) + u), x, atol=digits(1e-8, 1e-4))

    def test_newton_takes_a_handful_of_steps_where_iteration_takes_tens(self):
        f, u = TanhBlock(50), torch.randn(10, 50)
        steps, rtol = {}, digits(1e-8, 1e-6)
        for solver in (Picard(rtol=rtol), Newton(rtol=rtol)):
            deq = DEQ(f, solver=solver)
            deq(u)
            steps[type(solver)] = deq.stats.steps.double().mean()
        assert steps[Newton] <= 7  # one more evaluation than steps
        assert steps[Picard] > digits(20, 15)

    @pytest.mark.parametrize("layer", TANH_LAYERS)
    def test_gradcheck_at_the_notebooks_settings(self, layer):
        settings = TANH_LAYERS[layer]
        solver = type(settings["solver"])(rtol=1e-10, max_steps=200)
        deq = DEQ(TanhBlock(5), solver=solver, adjoint=settings["adjoint"]).double()
        assert gradcheck(
            deq, torch.randn(3, 5, requires_grad=True, dtype=torch.double), check_undefined_grad=False, fast_mode=True
        )

    def test_the_implicit_gradient_is_the_one_of_the_formula(self):
        # ∇_u ℓ = diag(1 − tanh²) (I − J)⁻ᵀ ∇_x ℓ, J = diag(1 − tanh²) W, by the notebook's dense solve.
        f, u = TanhBlock(5), torch.randn(3, 5, requires_grad=True)
        x = DEQ(f, solver=Newton())(u)
        g = torch.randn(3, 5)
        (ours,) = torch.autograd.grad(x, u, g)
        slope = 1 - x.detach() ** 2
        J = torch.eye(5) - slope[:, :, None] * f.linear.weight.detach()
        assert torch.allclose(ours, slope * torch.linalg.solve(J.mT, g[:, :, None])[:, :, 0], atol=digits(1e-8, 1e-4))


class TestConvolutionalDEQ:
    def test_the_block_is_the_notebooks_from_the_same_seed(self):
        class ResNetLayer(nn.Module):  # as it is written there
            def __init__(self, n_channels, n_inner_channels, kernel_size=3, num_groups=8):
                super().__init__()
                self.conv1 = nn.Conv2d(n_channels, n_inner_channels, kernel_size, padding=kernel_size // 2, bias=False)
                self.conv2 = nn.Conv2d(n_inner_channels, n_channels, kernel_size, padding=kernel_size // 2, bias=False)
                self.norm1 = nn.GroupNorm(num_groups, n_inner_channels)
                self.norm2 = nn.GroupNorm(num_groups, n_channels)
                self.norm3 = nn.GroupNorm(num_groups, n_channels)
                self.conv1.weight.data.normal_(0, 0.01)
                self.conv2.weight.data.normal_(0, 0.01)

            def forward(self, z, x):
                y = self.norm1(F.relu(self.conv1(z)))
                return self.norm3(F.relu(z + self.norm2(x + self.conv2(y))))

        torch.manual_seed(0)
        theirs = ResNetLayer(16, 24)
        torch.manual_seed(0)
        ours = ResidualBlock(16, 24)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        x, u = torch.randn(2, 16, 5, 5), torch.randn(2, 16, 5, 5)
        assert torch.equal(ours(x, u), theirs(x, u))

    @pytest.mark.parametrize(
        "solver", [Anderson(rtol=1e-4), Anderson(rtol=1e-4, damping=2.0), Picard(rtol=1e-4)], ids=repr
    )
    def test_anderson_at_both_mixings_and_forward_iteration(self, solver):
        f, u = ResidualBlock(16, 24), torch.randn(4, 16, 8, 8)
        solution = fixed_point(f, torch.zeros_like(u), u, solver=solver, trace=True)
        assert solution.converged.all()
        fx = f(solution.value, u)
        assert ((fx - solution.value).flatten(1).norm(dim=1) <= 1e-4 * fx.flatten(1).norm(dim=1) * (1 + 1e-9)).all()
        assert (solution.trace[0] > solution.residual).all()

    def test_gradcheck_at_the_notebooks_settings(self):
        f = ResidualBlock(2, 2, num_groups=2).double()
        solver = Anderson(rtol=1e-10, max_steps=500)
        deq = DEQ(f, solver=solver, adjoint=ImplicitAdjoint(solver=solver)).double()
        u = torch.randn(1, 2, 3, 3).double().requires_grad_()
        assert gradcheck(deq, u, eps=1e-5, atol=1e-3, check_undefined_grad=False, fast_mode=True)

    def test_backward_at_damping_2_and_the_plot_of_both_residuals(self, tmp_path):
        solver = Anderson(rtol=1e-4, max_steps=100, damping=2.0)
        deq = DEQ(ResidualBlock(16, 24), solver=solver, adjoint=ImplicitAdjoint(solver=solver))
        out = deq(torch.randn(4, 16, 8, 8, requires_grad=True))
        (out * torch.randn_like(out)).sum().backward()
        assert deq.stats.converged.all()
        assert deq.stats.backward.converged.all()
        figure = viz.residuals(deq.stats, rtol=1e-4, path=tmp_path / "residuals.png")
        for ax, trace in zip(figure.axes, (deq.stats.trace, deq.stats.backward.trace), strict=True):
            line = ax.lines[0].get_ydata()
            assert len(line) == len(trace)
            assert line[0] > 1e-4 >= line[-1]
        assert (tmp_path / "residuals.png").stat().st_size > 10_000

    def test_the_small_network_is_the_notebooks_from_the_same_seed(self):
        torch.manual_seed(0)
        f = ResidualBlock(48, 64, kernel_size=3)
        theirs = nn.Sequential(
            nn.Conv2d(3, 48, kernel_size=3, bias=True, padding=1),
            nn.BatchNorm2d(48),
            DEQ(f, solver=Anderson(rtol=1e-2, max_steps=25, memory=5)),
            nn.BatchNorm2d(48),
            nn.AvgPool2d(8, 8),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, 10),
        )
        torch.manual_seed(0)
        ours = ConvEquilibriumClassifier(3, 10, solver=Anderson(rtol=1e-2, max_steps=25, memory=5))
        u = torch.rand(2, 3, 32, 32)
        assert torch.allclose(ours(u), theirs(u), rtol=1e-12)
        assert sum(weight.numel() for weight in ours.parameters()) == sum(
            weight.numel() for weight in theirs.parameters()
        )


def epoch(batches, model, opt, scheduler=None):
    """The notebook's epoch, with the iterations per sample: loss, forward steps, backward steps."""
    total = samples = 0.0
    with Monitor() as monitor:
        for u, y in batches:
            loss = F.cross_entropy(model(u), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            if scheduler is not None:
                scheduler.step()
            total, samples = total + loss.item() * len(u), samples + len(u)
    assert monitor.missed == 0.0
    return total / samples, monitor.forward_steps, monitor.backward_steps


@pytest.mark.usefixtures("float32")
class TestTraining:
    @pytest.fixture
    def batches(self, tmp_path):
        write_mnist(tmp_path / "FashionMNIST/raw")
        return list(load("fashion-mnist", 20, tmp_path).train_dl)

    @pytest.mark.parametrize("layer", TANH_LAYERS)
    def test_the_dense_models_by_sgd(self, batches, layer):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 100), DEQ(TanhBlock(100), **TANH_LAYERS[layer]), nn.Linear(100, 10)
        )
        opt = optim.SGD(model.parameters(), lr=1e-1)
        first, *_ = epoch(batches, model, opt)
        for _ in range(4):
            last, steps, _ = epoch(batches, model, opt)
        assert last < first
        assert steps > 1

    def test_the_dense_classifier_is_that_model(self, batches):
        torch.manual_seed(0)
        theirs = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), DEQ(TanhBlock(100)), nn.Linear(100, 10))
        torch.manual_seed(0)
        ours = DenseEquilibriumClassifier(784, 10, 100)
        assert torch.equal(ours(batches[0][0]), theirs(batches[0][0]))

    def test_the_small_deq(self, batches):
        solver = Anderson(rtol=1e-2, max_steps=50)
        model = ConvEquilibriumClassifier(
            1, 10, 8, 8, halvings=2, cells=2, solver=solver, adjoint=ImplicitAdjoint(solver=solver)
        )
        opt = optim.Adam(model.parameters(), lr=1e-2)
        scheduler = optim.lr_scheduler.CosineAnnealingLR(opt, 4 * len(batches), eta_min=1e-6)
        first, forward, backward = epoch(batches, model, opt, scheduler)
        for _ in range(3):
            last, *_ = epoch(batches, model, opt, scheduler)
        assert last < first
        assert forward > 1
        assert backward > 1
