"""One draw of noise and one update of running statistics per solve, whatever way f makes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from implicitdl import (
    DEQ,
    Anderson,
    Auto,
    ConvergenceError,
    ImplicitAdjoint,
    Monitor,
    PhantomGradient,
    Picard,
    Unrolled,
    fixed_point,
    root,
)
from precision import digits

EXACT = [ImplicitAdjoint(), ImplicitAdjoint(order=2), Unrolled(), Unrolled(checkpoint=True)]


class Noisy(nn.Module):
    """tanh(drop(Wx) + u), the mask drawn by a module or by a function."""

    def __init__(self, drop, n=4):
        super().__init__()
        self.linear = nn.Linear(n, n)
        self.drop = drop
        with torch.no_grad():
            self.linear.weight.mul_(0.4)

    def forward(self, x, u):
        return torch.tanh(self.drop(self.linear(x)) + u)


class Normed(nn.Module):
    """tanh(0.3 norm(Wx) + u)."""

    def __init__(self, norm, n=4):
        super().__init__()
        self.linear, self.norm = nn.Linear(n, n), norm

    def forward(self, x, u):
        return torch.tanh(0.3 * self.norm(self.linear(x)) + u)


NOISE = {
    "dropout": lambda: nn.Dropout(0.5),
    "alpha": lambda: nn.AlphaDropout(0.3),
    "functional": lambda: lambda z: F.dropout(z, 0.5),
    "gaussian": lambda: lambda z: z + 0.1 * torch.randn_like(z),
}


class TestNoise:
    @pytest.mark.parametrize("noise", NOISE)
    def test_one_draw_a_solve(self, noise):
        deq, u = DEQ(Noisy(NOISE[noise]())), torch.randn(6, 4)
        torch.manual_seed(1)
        x = deq(u)
        after = torch.get_rng_state()
        torch.manual_seed(1)
        assert torch.allclose(deq.f(x, u), x, atol=digits(1e-9, 1e-4))
        assert torch.equal(torch.get_rng_state(), after), "a solve must leave the stream where one evaluation does"
        assert not torch.allclose(deq(u), x)

    @pytest.mark.float64
    @pytest.mark.parametrize("adjoint", EXACT, ids=repr)
    @pytest.mark.parametrize("noise", ["dropout", "functional"])
    def test_the_gradient_is_that_of_the_drawn_map(self, noise, adjoint):
        deq, u = DEQ(Noisy(NOISE[noise]()), adjoint=adjoint, solver=Picard()), torch.randn(3, 4, requires_grad=True)

        def seeded(u):
            torch.manual_seed(5)
            return deq(u)

        assert torch.autograd.gradcheck(seeded, u, fast_mode=True)
        assert adjoint != ImplicitAdjoint(order=2) or torch.autograd.gradgradcheck(seeded, u, fast_mode=True)

    def test_recomputing_in_backward_leaves_the_stream_alone(self):
        deq, u = DEQ(Noisy(nn.Dropout(0.5)), adjoint=Unrolled(checkpoint=True)), torch.randn(3, 4, requires_grad=True)
        x = deq(u)
        before = torch.get_rng_state()
        x.sum().backward()
        assert torch.equal(torch.get_rng_state(), before)

    def test_two_solves_before_one_backward_keep_their_own_draws(self):
        deq, u = DEQ(Noisy(nn.Dropout(0.5)), adjoint=Unrolled(checkpoint=True)), torch.randn(3, 4, requires_grad=True)

        def alone(seed):
            torch.manual_seed(seed)
            return torch.autograd.grad(deq(u).sum(), u)[0]

        expected = alone(1) + alone(2)
        torch.manual_seed(1)
        first = deq(u)
        torch.manual_seed(2)
        (together,) = torch.autograd.grad((first + deq(u)).sum(), u)
        assert torch.allclose(together, expected)

    def test_the_batch_stays_whole_where_noise_has_its_shape_and_only_there(self):
        # Easy samples finish early; without noise they leave the batch.
        rate = torch.tensor([[0.0]] * 6 + [[0.95]] * 2)
        sizes = []

        def f(x, rate, drop):
            sizes.append(len(x))
            return drop(rate * x) + 1

        for p, alone in ((0.0, {8, 2}), (1e-9, {8})):
            sizes.clear()
            fixed_point(
                lambda x, rate, p=p: f(x, rate, nn.Dropout(p)), torch.zeros(8, 1), rate, solver=Picard(max_steps=999)
            )
            assert set(sizes) == alone

    def test_evaluation_draws_nothing(self):
        deq, u = DEQ(Noisy(nn.Dropout(0.5))).eval(), torch.randn(3, 4)
        before = torch.get_rng_state()
        assert torch.equal(deq(u), deq(u))
        assert torch.equal(torch.get_rng_state(), before)

    def test_fixed_point_and_root_do_the_same(self):
        u = torch.randn(5, 4)
        assert fixed_point(lambda x, u: 0.25 * F.dropout(x) + u, torch.zeros(5, 4), u).converged.all()
        assert root(lambda x, u: x - 0.25 * F.dropout(x) - u, torch.zeros(5, 4), u).converged.all()


class TestStatistics:
    @pytest.mark.parametrize("adjoint", [*EXACT, PhantomGradient(steps=3)], ids=repr)
    def test_one_update_a_solve_with_the_statistics_at_the_solution(self, adjoint):
        deq, u = DEQ(Normed(nn.BatchNorm1d(4)), adjoint=adjoint), torch.randn(8, 4, requires_grad=True)
        norm = deq.f.norm
        for solves in (1, 2):
            before = norm.running_mean.clone()
            x = deq(u)
            assert int(norm.num_batches_tracked) == solves
            z = deq.f.linear(x).detach()
            assert torch.allclose(norm.running_mean, 0.9 * before + 0.1 * z.mean(dim=0), atol=1e-8)
        kept = norm.running_mean.clone()
        x.sum().backward()
        assert torch.equal(norm.running_mean, kept)
        assert int(norm.num_batches_tracked) == 2

    def test_without_grad_too(self):
        deq = DEQ(Normed(nn.BatchNorm1d(4)))
        with torch.no_grad():
            deq(torch.randn(8, 4))
        assert int(deq.f.norm.num_batches_tracked) == 1

    def test_cumulative_averages(self):
        deq = DEQ(Normed(nn.BatchNorm1d(4, momentum=None)))
        first, second = (deq.f.linear(deq(torch.randn(8, 4))).detach().mean(dim=0) for _ in range(2))
        assert torch.allclose(deq.f.norm.running_mean, (first + second) / 2, atol=1e-8)

    @pytest.mark.float64
    @pytest.mark.parametrize("adjoint", EXACT, ids=repr)
    def test_gradients_with_batch_statistics_are_those_of_the_coupled_map(self, adjoint):
        deq, u = DEQ(Normed(nn.BatchNorm1d(4)), adjoint=adjoint, solver=Picard()), torch.randn(5, 4, requires_grad=True)
        assert torch.autograd.gradcheck(deq, u, fast_mode=True)

    def test_two_solves_before_one_backward(self):
        deq, u = DEQ(Normed(nn.BatchNorm1d(4))), torch.randn(5, 4, requires_grad=True)
        one = torch.autograd.grad(deq(u).sum(), u)[0]
        two = torch.autograd.grad((deq(u) + 2 * deq(u)).sum(), u)[0]
        assert torch.allclose(two, 3 * one)

    @pytest.mark.parametrize("tracked", [True, False])
    @pytest.mark.parametrize("solver", [Picard(), Anderson(), Auto()], ids=repr)
    def test_a_coupled_batch_is_solved_as_one(self, solver, tracked):
        # On their own, the saturated samples would end early, and the statistics of the others go on changing.
        deq = DEQ(Normed(nn.BatchNorm1d(4, track_running_stats=tracked)), solver=solver)
        u = torch.cat((50 * torch.ones(6, 4), torch.randn(2, 4)))
        x = deq(u)
        assert deq.stats.converged.all()
        assert deq.stats.steps.tolist() == [int(deq.stats.steps[0])] * 8
        fx = deq.f(x, u)
        assert torch.allclose((fx - x).norm() / fx.norm(), deq.stats.residual, rtol=1e-3, atol=1e-14)

    def test_the_figures_of_a_coupled_batch_are_those_of_every_sample(self):
        deq, u = DEQ(Normed(nn.BatchNorm1d(4)), solver=Picard(rtol=1e-6)), torch.randn(5, 4, requires_grad=True)
        with Monitor() as monitor:
            deq(u).sum().backward()
        assert monitor.samples == 5
        stats = deq.stats
        assert stats.trace.shape == (int(stats.steps[0]), 5)
        assert stats.residual.shape == stats.backward.residual.shape == stats.backward.converged.shape == (5,)
        assert stats.backward.trace.shape == (int(stats.backward.steps[0]), 5)

    def test_evaluation_updates_nothing_and_finished_samples_leave(self):
        deq = DEQ(Normed(nn.BatchNorm1d(4))).eval()
        before = {name: buffer.clone() for name, buffer in deq.named_buffers()}
        deq(torch.randn(8, 4))
        assert all(torch.equal(buffer, before[name]) for name, buffer in deq.named_buffers())

    def test_instance_norm_with_running_statistics(self):
        class Image(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 2, 3, padding=1)
                self.norm = nn.InstanceNorm2d(2, track_running_stats=True)

            def forward(self, x, u):
                return torch.tanh(0.2 * self.norm(self.conv(x)) + u)

        deq = DEQ(Image())
        x = deq(torch.randn(3, 2, 5, 5))
        mean = deq.f.conv(x).detach().mean(dim=(0, 2, 3))
        assert torch.allclose(deq.f.norm.running_mean, 0.1 * mean, atol=1e-9)

    def test_spectral_norm_makes_one_power_iteration_a_solve(self):
        layer = parametrizations.spectral_norm(nn.Linear(4, 4))
        reference = parametrizations.spectral_norm(nn.Linear(4, 4))
        reference.load_state_dict(layer.state_dict())
        deq, u = DEQ(Noisy(nn.Identity())), torch.randn(3, 4)
        deq.f.linear = layer
        x = deq(0.1 * u)
        reference(x)
        ours, theirs = dict(layer.named_buffers()), dict(reference.named_buffers())
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_a_buffer_that_is_given_a_new_tensor(self):
        class Counted(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x, u):
                self.count = self.count + 1
                return 0.5 * x + u

        deq = DEQ(Counted())
        buffer = deq.f.count
        for _ in range(3):
            deq(torch.ones(2, 1))
        assert deq.f.count == 3
        assert deq.f.count is buffer

    def test_constant_buffers_cost_nothing_after_the_first_evaluation(self):
        class Shifted(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("shift", torch.ones(4))
                self.seen = []

            def forward(self, x, u):
                self.seen.append(self.shift)
                return 0.5 * x + u + self.shift

        deq = DEQ(Shifted())
        deq(torch.randn(3, 4))
        assert all(seen is deq.f.shift for seen in deq.f.seen[1:])

    def test_a_solve_that_raises_updates_nothing(self):
        deq = DEQ(Normed(nn.BatchNorm1d(4)), solver=Picard(max_steps=2), on_failure="raise")
        with pytest.raises(ConvergenceError):
            deq(torch.randn(8, 4))
        assert int(deq.f.norm.num_batches_tracked) == 0

    def test_intermediate_iterates_make_no_update_of_their_own(self):
        deq, u = DEQ(Normed(nn.BatchNorm1d(4)), solver=Picard()), torch.randn(8, 4)
        solution, (third, late) = deq.iterates(u, at=(3, 5000))
        assert int(deq.f.norm.num_batches_tracked) == 1
        assert torch.allclose(solution.value, deq(u), atol=digits(1e-9, 1e-4))
        assert torch.equal(deq.stats.steps, solution.steps)
        assert torch.allclose(late, solution.value, atol=digits(1e-9, 1e-4))
        x = torch.zeros(8, 4)
        for _ in range(3):
            x = deq.f(x, u)
        assert torch.allclose(third, x)

    def test_intermediate_iterates_share_the_draw_of_the_solution(self):
        deq, u = DEQ(Noisy(nn.Dropout(0.5))), torch.randn(8, 4)
        solution, (late,) = deq.iterates(u, at=(5000,))
        assert torch.allclose(late, solution.value, atol=digits(1e-9, 1e-4))

    def test_fixed_point_and_root_see_a_module(self):
        f, u = Normed(nn.BatchNorm1d(4)), torch.randn(8, 4)
        fixed_point(f, torch.zeros(8, 4), u)
        assert int(f.norm.num_batches_tracked) == 1
        root(f, torch.zeros(8, 4), 0 * u, on_failure="ignore")
        assert int(f.norm.num_batches_tracked) == 2

    @pytest.mark.float64
    def test_an_equilibrium_inside_an_equilibrium(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = DEQ(Normed(nn.BatchNorm1d(4, eps=1.0)))

            def forward(self, x, u):
                return 0.3 * self.inner(x) + u

        deq, u = DEQ(Outer()), torch.randn(3, 4, requires_grad=True)
        deq(u).sum().backward()
        assert int(deq.f.inner.f.norm.num_batches_tracked) == 1
        assert torch.autograd.gradcheck(deq, u, fast_mode=True)
