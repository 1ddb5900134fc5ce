"""DEQ: any f as a layer, where it starts, what it reports, and that it behaves like any other module."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from implicitdl import (
    DEQ,
    Anderson,
    ArgumentError,
    ConvergenceError,
    Equilibrium,
    ImplicitFunctionWarning,
    Picard,
    Report,
    Unrolled,
    certify,
)
from implicitdl.activations import TANH
from implicitdl.nn import DenseEquilibriumClassifier, RandomStart, ResidualBlock, TanhBlock, WarmStart, ZeroStart
from implicitdl.statespace import from_module
from precision import digits


class Dense(nn.Module):
    """tanh(Wx + u), without structure, and contractive."""

    def __init__(self, n=4):
        super().__init__()
        self.linear = nn.Linear(n, n)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, x, u):
        return torch.tanh(self.linear(x) + u)


class TestInputs:
    def test_one_tensor(self):
        deq, u = DEQ(Dense()), torch.randn(3, 4)
        x = deq(u)
        assert torch.allclose(deq.f(x, u), x, atol=digits(1e-9, 1e-4))

    def test_several_tensors_and_the_same_as_a_tuple(self):
        def f(x, u, scale):
            return torch.tanh(0.5 * x + u * scale)

        u, scale = torch.randn(3, 4), torch.rand(3, 1)
        x = DEQ(f)(u, scale)
        assert torch.allclose(f(x, u, scale), x, atol=digits(1e-9, 1e-4))
        assert torch.equal(DEQ(f)((u, scale)), x)

    @pytest.mark.float64
    def test_none(self):
        weight = torch.tensor([0.3, 0.6], requires_grad=True)
        x = DEQ(lambda x: weight * x + 1, x0=torch.zeros(5, 2))()
        assert torch.allclose(x, (1 / (1 - weight)).expand(5, 2))
        x.sum().backward()
        assert torch.allclose(weight.grad, 5 / (1 - weight.detach()) ** 2)

    def test_a_state_of_several_tensors(self):
        def f(state, u):
            x, y = state
            return torch.tanh(0.3 * x + u[:, :, None]), 0.5 * y + x.sum(dim=(1, 2))[:, None]

        deq, u = DEQ(f, x0=ZeroStart(((2, 3), (1,)))), torch.randn(4, 2)
        x, y = deq(u)
        assert x.shape == (4, 2, 3)
        assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(f((x, y), u), (x, y), strict=True))

    def test_integers_as_input(self):
        embedding = nn.Embedding(7, 3)
        x = DEQ(lambda x, u: torch.tanh(0.5 * x + embedding(u)), x0=ZeroStart((3,)))(torch.tensor([1, 5]))
        assert x.shape == (2, 3)
        assert x.dtype == embedding.weight.dtype

    def test_a_module_with_structure_is_solved_in_closed_form(self):
        f, u = TanhBlock(6), torch.randn(5, 6)

        class Plain(nn.Module):
            def forward(self, x, u):
                raise AssertionError("evaluated without its structure")

            def equilibrium(self, u):
                return Equilibrium(f.linear.weight, u, TANH)

        x = DEQ(Plain())(u)
        assert torch.allclose(f(x, u), x, atol=digits(1e-9, 1e-4))

    @given(batch=st.integers(1, 4), shape=st.lists(st.integers(1, 3), max_size=3), scale=st.floats(0.0, 3.0))
    @example(batch=1, shape=[2], scale=3.48191550940451e-163)  # whose squares underflow
    def test_one_sample_alone_equals_its_row_of_a_batch_of_any_shape(self, batch, shape, scale):
        u = scale * torch.linspace(-2, 2, batch * torch.Size(shape).numel()).reshape(batch, *shape)
        deq = DEQ(lambda x, u: torch.tanh(0.7 * x + u))
        solution = deq.solve(u)
        assert solution.converged.all()
        assert solution.value.shape == u.shape
        for i in range(batch):
            alone = deq.solve(u[i : i + 1])
            assert int(alone.steps) == int(solution.steps[i])
            assert torch.allclose(alone.value[0], solution.value[i], rtol=1e-9, atol=1e-12)


class TestStarts:
    @pytest.mark.float64
    def test_the_solution_does_not_depend_on_it(self):
        u = torch.randn(3, 4)
        f = Dense()
        x = DEQ(f)(u)
        for x0 in (
            torch.randn(3, 4),
            torch.randn(1, 4),
            lambda u: 2 * u,
            nn.Linear(4, 4),
            ZeroStart((4,)),
            RandomStart(5.0),
        ):
            assert torch.allclose(DEQ(f, x0=x0)(u), x, atol=1e-8)

    def test_a_tensor_of_one_row_is_everybodys_and_moves_with_the_model(self):
        deq = DEQ(Dense(), x0=torch.ones(1, 4))
        assert deq(torch.randn(3, 4)).shape == (3, 4)
        assert deq.float()(torch.randn(2, 4, dtype=torch.float32)).dtype == torch.float32
        assert set(deq.state_dict()) == {"f.linear.weight", "f.linear.bias"}

    def test_a_tuple_of_tensors(self):
        deq = DEQ(lambda state: (0.5 * state[0] + 1, state[0][:, :1]), x0=(torch.zeros(2, 3), torch.zeros(2, 1)))
        x, y = deq()
        assert torch.allclose(x, torch.full((2, 3), 2.0))
        assert torch.allclose(y, torch.full((2, 1), 2.0))

    def test_what_a_learned_start_learns_is_saved_and_trained_through_the_iterations(self):
        deq = DEQ(Dense(), x0=nn.Linear(4, 4), solver=Picard(max_steps=2), adjoint=Unrolled(), on_failure="ignore")
        assert "start.function.weight" in deq.state_dict()
        deq(torch.randn(3, 4)).sum().backward()
        assert deq.start.function.weight.grad.abs().sum() > 0

    def test_warm_start_goes_on_from_the_last_solution(self):
        deq, u = DEQ(Dense(), x0=WarmStart()), torch.randn(3, 4)
        cold = deq.solve(u)
        warm = deq.solve(u)
        assert (warm.steps == 1).all()
        assert torch.allclose(warm.value, cold.value)
        near = deq.solve(u + 1e-6)
        assert (near.steps < cold.steps).all()
        deq.start.forget()
        assert torch.equal(deq.solve(u).steps, cold.steps)

    def test_warm_start_is_dropped_when_the_shape_changes(self):
        deq = DEQ(Dense(), x0=WarmStart())
        for batch in (3, 2, 5):
            assert deq.solve(torch.randn(batch, 4)).converged.all()
        assert deq.float().solve(torch.randn(5, 4, dtype=torch.float32)).value.dtype == torch.float32

    def test_warm_start_keeps_neither_lost_samples_nor_the_users_tensor(self):
        rate = torch.tensor([[0.5], [2.0]])
        deq = DEQ(lambda x, u, rate: rate * x + u, x0=WarmStart(), solver=Picard(), on_failure="ignore")
        u = torch.ones(2, 1)
        with torch.no_grad():
            solution = deq.solve(u, rate)
        assert solution.converged.tolist() == [True, False]
        solution.value.fill_(torch.nan)
        again = deq.solve(u, torch.full((2, 1), 0.5))
        assert again.converged.all()
        assert again.steps[0] == 1
        assert torch.equal(deq.start._last[0], again.value)

    def test_warm_start_of_several_tensors(self):
        deq = DEQ(
            lambda state, u: (0.5 * state[0] + u, 0.5 * state[1] + u[:, :1]), x0=WarmStart(ZeroStart(((2,), (1,))))
        )
        u = torch.randn(3, 2)
        deq(u)
        assert (deq.solve(u).steps == 1).all()

    def test_random_start_is_noise_in_training_and_zero_in_evaluation(self):
        start = RandomStart(2.0)
        u = torch.zeros(2000, 5)
        assert start(u).std() == pytest.approx(2.0, rel=0.05)
        assert not torch.equal(start(u), start(u))
        assert (start.eval()(u) == 0).all()

    def test_random_start_of_a_share_of_the_samples(self):
        noisy = (RandomStart(share=0.25)(torch.zeros(4000, 3)) != 0).all(dim=1)
        assert noisy.double().mean() == pytest.approx(0.25, abs=0.03)
        assert (RandomStart(share=0.0)(torch.zeros(10, 3)) == 0).all()

    def test_random_start_finds_both_solutions_of_a_map_that_depends_on_the_path(self):
        deq = DEQ(lambda x, u: torch.tanh(2 * x + u), x0=RandomStart(), solver=Picard())
        u = torch.zeros(200, 1)
        assert deq(u).sign().unique().tolist() == [-1.0, 1.0]
        assert torch.equal(deq.eval()(u), u)


class TestStats:
    def test_figures_of_the_last_call_and_of_its_backward(self):
        deq, u = DEQ(Dense(), solver=Picard(rtol=1e-6)), torch.randn(3, 4, requires_grad=True)
        assert deq.stats is None
        x = deq(u)
        stats = deq.stats
        assert isinstance(stats, Report)
        assert stats.trace.shape == (int(stats.steps.max()), 3)
        assert stats.backward.steps is None
        x.sum().backward()
        assert stats.backward.steps.shape == (3,)
        assert stats.backward.trace.shape == (int(stats.backward.steps.max()), 3)
        for i in range(3):
            assert stats.trace[stats.steps[i] - 1, i] == stats.residual[i] <= 1e-6
        deq(u)
        assert deq.stats is not stats

    def test_they_hold_neither_the_value_nor_a_graph(self):
        deq = DEQ(Dense())
        x = deq(torch.randn(3, 4))
        value = weakref.ref(x)
        assert not any(part.requires_grad for part in (deq.stats.residual, deq.stats.steps, deq.stats.trace))
        del x
        assert value() is None

    def test_histories_can_be_left_out_and_are_for_cheap_maps_unless_asked_for(self):
        u = torch.randn(3, 4)
        for f, trace, kept in (
            (Dense(), None, True), (Dense(), False, False), (TanhBlock(4), None, False), (TanhBlock(4), True, True)
        ):  # fmt: skip
            deq = DEQ(f, trace=trace)
            deq(u).sum().backward()
            assert (deq.stats.trace is not None) == kept
            assert (deq.stats.backward.trace is not None) == kept

    def test_a_miss_is_loud_and_reported(self):
        u = torch.ones(2, 1, requires_grad=True)
        deq = DEQ(lambda x, u: 0.99 * x + u, solver=Picard(max_steps=20))
        with pytest.warns(ImplicitFunctionWarning, match=r"fixed_point\(Picard\): 2 of 2 samples"):
            deq(u)
        assert not deq.stats.converged.any()
        deq.on_failure = "raise"
        with pytest.raises(ConvergenceError):
            deq(u)


class TestIterates:
    def test_they_are_the_evaluations_of_the_solve(self):
        deq, u = DEQ(Dense(), solver=Picard()), torch.randn(3, 4)
        solution, (first, third) = deq.iterates(u, at=(1, 3))
        expected = torch.zeros(3, 4)
        states = []
        for _ in range(3):
            expected = deq.f(expected, u)
            states.append(expected)
        assert torch.equal(first, states[0])
        assert torch.equal(third, states[2])
        assert torch.allclose(solution.value, deq(u), atol=1e-9)
        assert torch.equal(deq.stats.steps, solution.steps)

    def test_their_gradient_is_that_of_one_evaluation(self):
        deq, u = DEQ(Dense(), solver=Picard()), torch.randn(3, 4, requires_grad=True)
        _, (second,) = deq.iterates(u, at=[2])
        ours = torch.autograd.grad(second.pow(2).sum(), (u, *deq.f.parameters()))
        x = deq.f(torch.zeros(3, 4), u).detach()
        phantom = torch.autograd.grad(deq.f(x, u).pow(2).sum(), (u, *deq.f.parameters()))
        assert all(torch.allclose(a, b) for a, b in zip(ours, phantom, strict=True))

    @pytest.mark.float64
    def test_the_solution_keeps_its_exact_gradient(self):
        deq, u = DEQ(Dense()), torch.randn(2, 4, requires_grad=True)
        assert torch.autograd.gradcheck(lambda u: deq.iterates(u, at=(2,))[0].value, u, fast_mode=True)

    def test_beyond_the_end_it_is_the_solution(self):
        deq, u = DEQ(Dense()), torch.randn(3, 4)
        solution, (late,) = deq.iterates(u, at=(5000,))
        assert torch.allclose(late, solution.value, atol=digits(1e-9, 1e-4))

    def test_every_sample_has_every_iterate_though_some_finish_early(self):
        rate = torch.tensor([[0.0], [0.1], [0.9], [0.95]])
        deq = DEQ(lambda x, u: u * x + 1, solver=Picard(max_steps=1000))
        _, states = deq.iterates(rate, at=range(1, 60, 10))
        assert all(state.shape == (4, 1) for state in states)

    def test_states_of_several_tensors(self):
        deq = DEQ(lambda state, u: (0.5 * state[0] + u, 0.5 * state[1] + u[:, :1]), x0=ZeroStart(((2,), (1,))))
        _, ((x, y),) = deq.iterates(torch.ones(3, 2), at=(1,))
        assert (x == 1).all()
        assert (y == 1).all()


class TestModule:
    @pytest.mark.float64
    def test_deepcopy_pickle_state_dict_and_to(self):
        deq, u = (
            DEQ(ResidualBlock(2, 4, num_groups=2), solver=Anderson(rtol=1e-6), x0=WarmStart()),
            torch.randn(2, 2, 3, 3),
        )
        x = deq(u)
        for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
            assert torch.allclose(other(u), x, atol=1e-5)
            assert other.solver == deq.solver
        fresh = DEQ(ResidualBlock(2, 4, num_groups=2))
        fresh.load_state_dict(deq.state_dict())
        assert torch.allclose(fresh(u), x, atol=1e-5)
        assert deq.float()(u.float()).dtype == torch.float32
        assert "Anderson(rtol=1e-06" in repr(deq)

    def test_it_is_a_layer_of_a_sequential(self):
        net = nn.Sequential(nn.Linear(3, 4), DEQ(Dense()), nn.Linear(4, 2))
        net(torch.randn(5, 3)).sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())

    @pytest.mark.float64
    def test_functional_call_reaches_the_weights(self):
        deq, u = DEQ(Dense()), torch.randn(2, 4, requires_grad=True)
        names = [name for name, _ in deq.named_parameters()]

        def call(u, *weights):
            return torch.func.functional_call(deq, dict(zip(names, weights, strict=True)), (u,))

        assert torch.autograd.gradcheck(call, (u, *deq.parameters()), fast_mode=True)

    def test_a_transform_leaves_nothing_of_its_own_behind(self):
        deq, u = DEQ(TanhBlock(4), x0=WarmStart()), torch.randn(3, 4, requires_grad=True)
        transformed = torch.func.grad(lambda u: deq(u).sum())(u.detach())
        assert deq.stats is None
        deq(u).sum().backward()
        assert torch.allclose(u.grad, transformed, atol=1e-9)


class TestCheckpointedUnrolling:
    def test_it_keeps_the_states_and_not_what_f_keeps(self):
        f, u = ResidualBlock(4, 16, num_groups=2), torch.randn(2, 4, 6, 6, requires_grad=True)

        def kept(adjoint):
            seen = {}

            def keep(tensor):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            deq = DEQ(f, solver=Picard(rtol=1e-14, max_steps=20), adjoint=adjoint, on_failure="ignore")
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                x = deq(u)
            x.pow(2).sum().backward()
            gradient, u.grad = u.grad, None
            assert (deq.stats.steps == 20).all()
            return sum(seen.values()), gradient

        plain, exact = kept(Unrolled())
        checkpointed, same = kept(Unrolled(checkpoint=True))
        weights = sum(weight.nbytes for weight in f.parameters())
        assert checkpointed <= 21 * u.nbytes + weights < plain / 5
        assert torch.allclose(same, exact)

    def test_it_is_evaluated_again_under_the_autocast_of_the_forward_pass(self):
        f, u = Dense().float(), torch.randn(3, 4, dtype=torch.float32)
        gradients = []
        for adjoint in (Unrolled(), Unrolled(checkpoint=True)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = DEQ(f, adjoint=adjoint, solver=Picard())(u)
            gradients.append(torch.autograd.grad(x.float().sum(), f.linear.weight)[0])
        assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DEQ(3.0), "f to be a function or a Module, got 3.0"),
        (lambda: DEQ(Dense), "f to be a function or a Module, got <class.*Pass an instance"),
        (lambda: DEQ(Dense(), solver=Anderson), "DEQ: expected solver to be a Solver"),
        (lambda: DEQ(Dense(), adjoint="exact"), "DEQ: expected adjoint to be an Adjoint"),
        (lambda: DEQ(Dense(), on_failure="shout"), "one of raise, warn, ignore"),
        (lambda: DEQ(Dense(), x0="zeros"), "x0 to be a tensor .*, got 'zeros'. Leave it out"),
        (lambda: DEQ(Dense(), x0=()), r"x0 to be a tensor .*, got \(\)"),
        (lambda: DEQ(Dense(), x0=WarmStart), "x0 to be a tensor .*, got <class"),
        (lambda: DEQ(Dense())([1.0]), "u of tensors.*got list. Let f close over"),
        (lambda: DEQ(Dense())(torch.tensor(1.0)), "got a tensor without dimensions"),
        (lambda: DEQ(lambda x: x)(), "for an f without u, got none. Pass x0="),
        (
            lambda: DEQ(Dense(), x0=torch.zeros(3, 4))(torch.zeros(2, 4)),
            r"DEQ: expected x0 of shape \(batch=2, .*got \(3, 4\)",
        ),
        (lambda: DEQ(TanhBlock(4), x0=torch.zeros(3, 4))(torch.zeros(2, 4)), r"x0 of shape \(batch=2, .*got \(3, 4\)"),
        (
            lambda: DEQ(TanhBlock(4), x0=lambda u: u[:, :3])(torch.zeros(2, 4)),
            r"x0 of 4 entries a sample.*got \(2, 3\)",
        ),
        (
            lambda: DEQ(Dense()).iterates(torch.zeros(1, 4), at=3),
            r"at to be numbers, such as \(2, 5\), got 3. Pass at=\(3,\)",
        ),
        (lambda: DEQ(Dense()).iterates(torch.zeros(1, 4), at=(0,)), "numbers in at to be a positive integer, got 0"),
        (lambda: RandomStart(0.0), "scale to be a positive finite number"),
        (lambda: RandomStart(share=2.0), "0 ≤ share ≤ 1, got 2.0"),
        (lambda: WarmStart(WarmStart()), "first to be a start of another kind"),
        (lambda: TanhBlock(4).equilibrium(torch.zeros(2, 5)), r"u of shape \(batch, n=4\), got \(2, 5\)"),
    ],
)
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


class TestMatrices:
    def test_a_tanh_layer_converts_with_what_is_around_it(self):
        network = torch.nn.Sequential(torch.nn.Linear(5, 4), DEQ(TanhBlock(4)), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        u = torch.randn(7, 5)
        space = from_module(network, u)
        assert [(block.activation.name, block.size) for block in space.blocks] == [("relu", 4), ("tanh", 4)]
        torch.testing.assert_close(space(u), network(u))

    def test_its_bounds_can_be_proved(self):
        classifier = DenseEquilibriumClassifier(6, 3, 5)
        with torch.no_grad():
            classifier.deq.f.linear.weight.mul_(0.3)
        space = from_module(torch.nn.Sequential(classifier.stem, classifier.deq, classifier.head), torch.randn(2, 6))
        assert certify.well_posed(space).unique

    @pytest.mark.parametrize(
        ("f", "name"), [(ResidualBlock(8, 8), "ResidualBlock"), (lambda x, u: torch.tanh(0.5 * x + u), "<lambda>")]
    )
    def test_an_arbitrary_f_has_none_and_is_named(self, f, name):
        u = torch.randn(2, 8, 3, 3, dtype=torch.float32)
        network = torch.nn.Sequential(torch.nn.ReLU(), DEQ(f))
        message = rf"from_module: expected operations .*, got DEQ at '1': .*the arbitrary {name}\. Convert what comes"
        with pytest.raises(ArgumentError, match=message):
            from_module(network, u)


def test_a_typo_in_a_setting_is_a_type_error():
    with pytest.raises(TypeError, match="max_iter"):
        DEQ(Dense(), max_iter=10)
