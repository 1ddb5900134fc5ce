"""Samples that influence one another through f: found, solved as one, and said."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

from implicitdl import (
    DEQ,
    GMRES,
    SHINE,
    Aitken,
    Anderson,
    ArgumentError,
    Auto,
    Broyden,
    CoupledRowsWarning,
    Equilibrium,
    ImplicitAdjoint,
    ImplicitFunctionWarning,
    Newton,
    PhantomGradient,
    Picard,
    Unrolled,
    fixed_point,
    root,
)
from precision import digits

SOLVERS = [Auto(), Picard(), Aitken(), Anderson(), Broyden(), Newton()]
found = pytest.mark.filterwarnings("ignore::implicitdl.CoupledRowsWarning")


def graph(n, d, act, dtype=None, seed=0):
    """X = φ(W X A + B) with ‖W‖₂‖A‖₂ = ½, and its tensors."""
    torch.manual_seed(seed)
    W, A = torch.randn(n, n, dtype=dtype), torch.randn(d, d, dtype=dtype)
    W, A = 0.5 * W / torch.linalg.matrix_norm(W, 2), A / torch.linalg.matrix_norm(A, 2)
    B = torch.randn(n, d, dtype=dtype)
    # Nodes of very different sizes, some at their solution at once, and cotangents likewise.
    B[:: max(n // 5, 2)] = 0
    g = torch.randn(n, d, dtype=dtype) * 10.0 ** torch.randint(-6, 2, (n, 1)).to(W.dtype)
    return W.requires_grad_(), A, B.requires_grad_(), g


def dense(f, x, weights, g):
    """The solution by plain iteration to the end, and the gradients by a dense adjoint solve."""
    with torch.no_grad():
        for _ in range(400):
            x = f(x)
    J = torch.autograd.functional.jacobian(lambda z: f(z).flatten(), x).reshape(x.numel(), x.numel())
    v = torch.linalg.solve(torch.eye(x.numel(), dtype=x.dtype) - J.t(), g.flatten()).view_as(x)
    return x, torch.autograd.grad(f(x), weights, v)


def by(solver):
    return ImplicitAdjoint(solver=solver)


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


class TestGraphs:
    @found
    @pytest.mark.parametrize("solver", SOLVERS, ids=repr)
    def test_a_chain_in_which_all_but_one_node_stand_still_at_first(self, solver):
        P, b = torch.diag(torch.ones(5), -1), torch.zeros(6, 1)
        b[0] = 1
        solution = fixed_point(lambda x: 0.5 * P @ x + b, torch.zeros(6, 1), solver=solver)
        assert solution.converged.all()
        assert torch.allclose(solution.value.flatten(), 0.5 ** torch.arange(6.0), atol=digits(1e-9, 1e-5))

    @found
    @pytest.mark.parametrize(
        ("solver", "act"),
        [*((solver, act) for solver in SOLVERS for act in (nn.ReLU(), nn.Tanh())), (GMRES(), nn.Identity())],
        ids=repr,
    )
    def test_value_and_gradient_are_those_of_a_dense_solve(self, solver, act):
        W, A, B, g = graph(12, 3, act)

        def f(x):
            return act(W @ x @ A + B)

        x, expected = dense(f, torch.zeros(12, 3), (W, B), g)
        solution = fixed_point(f, torch.zeros(12, 3), solver=solver)
        assert solution.converged.all()
        assert relative(solution.value, x) < digits(1e-8, 1e-4)
        for ours, theirs in zip(torch.autograd.grad(solution.value, (W, B), g), expected, strict=True):
            assert relative(ours, theirs) < digits(1e-8, 1e-4)
        assert solution.backward.converged.all()

    @found
    @pytest.mark.parametrize(
        "adjoint",
        [
            ImplicitAdjoint(order=2),
            ImplicitAdjoint(solver=Anderson()),
            ImplicitAdjoint(solver=GMRES()),
            ImplicitAdjoint(solver=Picard()),
            ImplicitAdjoint(solver=Broyden()),
            Unrolled(),
            Unrolled(checkpoint=True),
            PhantomGradient(steps=60),
        ],
        ids=repr,
    )
    def test_every_exact_adjoint(self, adjoint):
        W, A, B, g = graph(10, 3, torch.tanh)

        def f(x):
            return torch.tanh(W @ x @ A + B)

        x, expected = dense(f, torch.zeros(10, 3), (W, B), g)
        solution = fixed_point(f, torch.zeros(10, 3), adjoint=adjoint, solver=Picard(rtol=digits(1e-12, 1e-6)))
        assert relative(solution.value, x) < digits(1e-8, 1e-4)
        for ours, theirs in zip(torch.autograd.grad(solution.value, (W, B), g), expected, strict=True):
            assert relative(ours, theirs) < digits(1e-8, 1e-4)

    @found
    @pytest.mark.parametrize("seed", range(10))
    def test_random_graphs_of_all_sizes(self, seed):
        n, act = (5, 7, 12, 20, 33, 50, 70, 100, 150, 200)[seed], (torch.relu, torch.tanh)[seed % 2]
        dtype = (torch.float64, torch.float32)[seed // 2 % 2]
        W, A, B, g = graph(n, 4, act, dtype, seed)

        def f(x):
            return act(W @ x @ A + B)

        x, expected = dense(f, torch.zeros(n, 4, dtype=dtype), (W, B), g)
        solution = fixed_point(f, torch.zeros(n, 4, dtype=dtype))
        tolerance = 100 * {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
        assert solution.converged.all()
        assert relative(solution.value, x) < tolerance
        for ours, theirs in zip(torch.autograd.grad(solution.value, (W, B), g), expected, strict=True):
            assert relative(ours, theirs) < tolerance

    @found
    @pytest.mark.long
    @pytest.mark.parametrize("seed", range(50))
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_random_graphs_by_every_solver_and_exact_adjoint(self, seed, dtype):
        n, act = 5 + 195 * seed // 49, (torch.relu, torch.tanh)[seed % 2]
        W, A, B, g = graph(n, 3, act, dtype, seed)

        def f(x):
            return act(W @ x @ A + B)

        x, expected = dense(f, torch.zeros(n, 3, dtype=dtype), (W, B), g)
        tolerance = 100 * {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
        ways = [(solver, ImplicitAdjoint()) for solver in SOLVERS]
        ways += [(Auto(), adjoint) for adjoint in (ImplicitAdjoint(order=2), *map(by, (*SOLVERS[:-1], GMRES())))]
        # The derivative of the last iterate lags behind its value: it is given a tighter forward solve.
        ways += [(Picard(rtol=tolerance / 1e4 if dtype == torch.float64 else None), Unrolled())]
        for solver, adjoint in ways:
            solution = fixed_point(f, torch.zeros(n, 3, dtype=dtype), solver=solver, adjoint=adjoint)
            assert relative(solution.value, x) < tolerance, (solver, adjoint)
            for ours, theirs in zip(torch.autograd.grad(solution.value, (W, B), g), expected, strict=True):
                assert relative(ours, theirs) < tolerance, (solver, adjoint)

    @found
    @pytest.mark.parametrize("weight", [0.5, 0.9])
    def test_messages_travel_two_hundred_nodes(self, weight):
        n = 200
        b = torch.zeros(n, 1, requires_grad=True)
        with torch.no_grad():
            b[0] = 1

        def shifted(x):
            return torch.cat((torch.zeros_like(x[:1]), x[:-1]))

        solution = fixed_point(lambda x: weight * shifted(x) + b, torch.zeros(n, 1))
        assert solution.converged.all()
        assert torch.allclose(solution.value.flatten(), weight ** torch.arange(float(n)), atol=digits(1e-8, 1e-4))
        (gradient,) = torch.autograd.grad(solution.value[-1].sum(), b)
        assert torch.allclose(gradient.flatten(), weight ** torch.arange(float(n)).flip(0), atol=digits(1e-8, 1e-4))

    @found
    def test_three_graph_convolutions_with_one_labelled_node(self):
        n, d = 30, 4
        ring = torch.eye(n).roll(1, 0) + torch.eye(n).roll(-1, 0)
        layers = nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        with torch.no_grad():
            for layer in layers:
                layer.weight.div_(1.5 * torch.linalg.matrix_norm(layer.weight, 2))
                layer.bias.zero_()
        u = torch.randn(n, d)

        def f(x, u):
            for layer in layers:
                x = torch.tanh(layer(0.5 * ring @ x))
            return x + u

        weights = tuple(layers.parameters())
        g = torch.zeros(n, d)
        g[n // 2] = 1
        x, expected = dense(lambda x: f(x, u), torch.zeros(n, d), weights, g)
        solution = fixed_point(f, torch.zeros(n, d), u)
        assert relative(solution.value, x) < digits(1e-8, 1e-4)
        for ours, theirs in zip(torch.autograd.grad(solution.value, weights, g), expected, strict=True):
            assert relative(ours, theirs) < digits(1e-8, 1e-4)

    @found
    def test_a_state_without_a_batch_dimension(self):
        M, b = 0.4 * torch.linalg.qr(torch.randn(9, 9))[0], torch.randn(9, requires_grad=True)
        solution = fixed_point(lambda x: M @ x + b, torch.zeros(9))
        assert torch.allclose(solution.value, torch.linalg.solve(torch.eye(9) - M, b), atol=digits(1e-9, 1e-5))
        (gradient,) = torch.autograd.grad(solution.value[3], b)
        assert torch.allclose(gradient, torch.linalg.inv(torch.eye(9) - M)[3], atol=digits(1e-9, 1e-5))

    @found
    def test_a_vector_of_features_among_args_with_as_many_entries_as_there_are_samples(self):
        scale = torch.tensor([0.1, 0.9, 0.5, 0.3])

        def f(x, u, scale):
            return scale * torch.tanh(x) + u

        u = torch.randn(4, 4)
        solution = fixed_point(f, torch.zeros(4, 4), u, scale, solver=Picard())
        assert torch.allclose(f(solution.value, u, scale), solution.value, atol=digits(1e-9, 1e-4))

    @found
    def test_a_tuple_of_states(self):
        torch.manual_seed(3)
        W = 0.4 * torch.linalg.qr(torch.randn(8, 8))[0]
        b = torch.randn(8, 2) * 10.0 ** torch.arange(-4.0, 4.0).unsqueeze(1)

        def f(s):
            return (torch.tanh(W @ s[0] + s[1].mean(dim=1, keepdim=True)) + b, 0.3 * torch.tanh(s[0][:, :1]))

        solution = fixed_point(f, (torch.zeros(8, 2), torch.zeros(8, 1)))
        for part, mapped in zip(solution.value, f(solution.value), strict=True):
            assert relative(mapped, part) < digits(1e-9, 1e-5)

    @found
    def test_root(self):
        W = 0.5 * torch.linalg.qr(torch.randn(7, 7))[0]
        b = torch.randn(7, 1) * torch.tensor([0.0, 0, 0, 0, 0, 0, 1]).unsqueeze(1)
        solution = root(lambda x: x - torch.tanh(W @ x) - b, torch.zeros(7, 1))
        assert torch.allclose(torch.tanh(W @ solution.value) + b, solution.value, atol=digits(1e-8, 1e-4))


class TestSaid:
    def chain(self, **options):
        P, b = torch.diag(torch.ones(5), -1), torch.ones(6, 1)
        return fixed_point(lambda x: 0.5 * P @ x + b, torch.zeros(6, 1), **options)

    def test_once_with_the_remedy(self):
        with pytest.warns(CoupledRowsWarning, match="coupled=True") as caught:
            self.chain(on_failure="raise")
        assert len(caught) == 1
        assert issubclass(CoupledRowsWarning, ImplicitFunctionWarning)

    def test_in_the_same_words_every_time_so_that_python_shows_them_once(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                self.chain()
        assert len(caught) == 1

    def test_coupled_true_is_silent_and_one_row(self):
        solution = self.chain(coupled=True)
        assert solution.converged.all()
        assert len(set(solution.steps.tolist())) == len(set(solution.residual.tolist())) == 1

    def test_backward_says_it_too(self):
        W, A, B, g = graph(12, 3, torch.tanh)
        solution = fixed_point(
            lambda x: torch.tanh(W @ x @ A + B), torch.zeros(12, 3), on_failure="raise", coupled=True
        )
        solution.value.backward(g)
        assert solution.backward.converged.all()

    def test_figures_count_both_solves(self):
        with pytest.warns(CoupledRowsWarning):
            solution = self.chain(trace=True)
        steps = int(solution.steps.max())
        assert solution.trace.shape == (steps, 6)
        assert steps > int(self.chain(coupled=True).steps[0])

    def test_a_deq_passes_it_on(self):
        P = torch.diag(torch.ones(5), -1)
        deq = DEQ(lambda x, u: 0.5 * P @ x + u, coupled=True)
        x = deq(torch.ones(6, 1))
        assert torch.allclose(0.5 * P @ x + 1, x, atol=digits(1e-9, 1e-5))
        assert deq.stats.converged.all()

    @pytest.mark.parametrize("bad", [1, "yes", torch.tensor(True)])
    def test_what_is_no_answer_is_refused(self, bad):
        with pytest.raises(ArgumentError, match="coupled to be True, False or None"):
            fixed_point(torch.cos, torch.zeros(2, 1), coupled=bad)
        with pytest.raises(ArgumentError, match="coupled to be True, False or None"):
            DEQ(torch.cos, coupled=bad)

    def test_an_equilibrium_is_never_coupled(self):
        with pytest.raises(ArgumentError, match="maps each row on its own"):
            fixed_point(Equilibrium(torch.zeros(2, 2), torch.ones(3, 2)), None, coupled=True)

    def test_args_that_are_no_batch_name_the_remedy(self):
        adjacency, x0 = torch.zeros(7, 7), torch.zeros(3, 1)
        with pytest.raises(ArgumentError, match="coupled=True"):
            fixed_point(lambda x, w: x, x0, adjacency)
        assert fixed_point(lambda x, w: 0.5 * x + w.sum() + 1, x0, adjacency, coupled=True).converged.all()


class TestPrice:
    """What looking costs where samples do not influence one another."""

    def counted(self, grad, **options):
        counts = []

        def f(x, u):
            counts.append(len(x))
            return torch.tanh(0.9 * x + u)

        u = torch.linspace(-3, 3, 8).unsqueeze(1).requires_grad_(grad)
        fixed_point(f, torch.zeros(8, 1), u, solver=Picard(), **options)
        return len(counts)

    def test_one_evaluation_at_most(self):
        assert self.counted(False) <= self.counted(False, coupled=False) + 1

    def test_none_where_the_gradient_needs_it_anyway(self):
        assert self.counted(True) == self.counted(True, coupled=False)

    def test_one_product_in_backward(self):
        products = []

        class Counted(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 0.9 * x

            @staticmethod
            def backward(ctx, g):
                products.append(len(g))
                return 0.9 * g

        def count(coupled):
            products.clear()
            u = torch.linspace(-3, 3, 8).unsqueeze(1).requires_grad_()
            x = fixed_point(lambda x, u: Counted.apply(x).tanh() + u, torch.zeros(8, 1), u, coupled=coupled).value
            x.sum().backward()
            return len(products)

        assert count(None) == count(False) + 1


class Block(nn.Module):
    """tanh(0.3 norm(Wx) + u)."""

    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), norm

    def forward(self, x, u):
        return torch.tanh(0.3 * self.norm(self.linear(x)) + u)


class Holder:
    """An object that is no Module, with a method that uses one."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x, u):
        return self.block(x, u)


def defaulted(block):
    def f(x, u, block=block):
        return block(x, u)

    return f


def nested(block):
    def f(x, u):
        return (lambda z: block(z, u))(x)

    return f


WAYS = {
    "module": lambda m: m,
    "method": lambda m: m.forward,
    "lambda": lambda m: lambda x, u: m(x, u),
    "partial": lambda m: functools.partial(lambda m, x, u: m(x, u), m),
    "method of an object": lambda m: Holder(m).__call__,
    "callable object": lambda m: Holder(m),
    "default": defaulted,
    "nested": nested,
    "list": lambda m: (lambda layers: lambda x, u: layers[0](x, u))([m]),
}


class TestBatchNormHoweverItIsReached:
    @pytest.mark.parametrize("tracked", [True, False])
    @pytest.mark.parametrize("way", WAYS)
    def test_the_batch_is_one_with_one_update(self, way, tracked):
        # The saturated samples would end early, and the statistics of the others go on changing.
        block = Block(nn.BatchNorm1d(4, track_running_stats=tracked))
        u = torch.cat((50 * torch.ones(6, 4), torch.randn(2, 4)))
        expected = fixed_point(block, torch.zeros(8, 4), u)
        block = Block(nn.BatchNorm1d(4, track_running_stats=tracked)).requires_grad_(False)
        u = u.clone().requires_grad_()
        solution = fixed_point(WAYS[way](block), torch.zeros(8, 4), u)
        assert solution.steps.tolist() == [int(solution.steps[0])] * 8
        assert expected.converged.all()
        fx = block(solution.value, u)
        assert relative(solution.value, fx) < digits(2e-10, 2e-5)
        if tracked:
            assert int(block.norm.num_batches_tracked) == 2  # the solve's, and that of the line above
        solution.value.sum().backward()

    @pytest.mark.parametrize("solver", [Auto(), Picard(), Anderson(), Broyden(), Newton()], ids=repr)
    @pytest.mark.parametrize("differentiated", [True, False])
    def test_statistics_are_those_of_the_solution(self, solver, differentiated):
        # A claim on a state that has grown is judged by an evaluation somewhere else.
        norm = nn.BatchNorm1d(3, momentum=1.0).requires_grad_(differentiated)

        def f(x, u):
            norm(0.9 * x + u)
            return 0.9 * x + u

        u = torch.randn(8, 3, requires_grad=differentiated)
        solution = fixed_point(f, torch.zeros(8, 3), u, solver=solver, on_failure="raise")
        assert relative(norm.running_mean, (0.9 * solution.value + u).mean(0)) < 1e-5

    def test_batch_norm_that_f_does_not_use_couples_nothing(self):
        block = Block(nn.Identity())
        block.unused = nn.BatchNorm1d(4)
        u = torch.cat((5 * torch.ones(3, 4), torch.zeros(3, 4)))
        solution = fixed_point(lambda x, u: block(x, u), torch.zeros(6, 4), u, solver=Picard())
        assert len(set(solution.steps.tolist())) > 1
        assert int(block.unused.num_batches_tracked) == 0

    def test_layers_outside_of_f_in_the_same_module_are_left_alone(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.bn2, self.c = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 4)

            def forward(self, x, v):
                return 0.1 * self.bn2(torch.tanh(self.c(x))) + v

        net, u = Net(), torch.randn(6, 4, requires_grad=True)
        h = net.bn(u)
        fixed_point(net, torch.zeros_like(h), h).value.square().sum().backward()
        assert int(net.bn.num_batches_tracked) == int(net.bn2.num_batches_tracked) == 1
        assert torch.isfinite(u.grad).all()

    def test_the_same_layer_inside_and_outside(self):
        block, u = Block(nn.BatchNorm1d(4)), torch.randn(6, 4, requires_grad=True)
        h = block.norm(u)
        fixed_point(block, torch.zeros_like(h), h).value.square().sum().backward()
        assert int(block.norm.num_batches_tracked) == 2

    def test_a_buffer_of_the_users_that_f_moves_and_the_graph_outside_holds_is_loud(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("scale", torch.ones(4))

            def forward(self, x, u):
                self.scale.mul_(0.5)
                return 0.1 * x + u

        f, u = Scaled(), torch.randn(3, 4, requires_grad=True)
        x = fixed_point(f, torch.zeros(3, 4), u * f.scale).value
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            x.sum().backward()

    def test_dropout_reached_by_a_lambda_in_training_keeps_the_batch_whole(self):
        linear, drop = nn.Linear(4, 4), nn.Dropout(0.5)

        def f(x, u):
            return torch.tanh(0.3 * drop(linear(x)) + u)

        assert fixed_point(f, torch.zeros(6, 4), torch.randn(6, 4)).converged.all()


@found
def test_shine_by_the_estimate_of_the_whole_batch():
    W, A, B, g = graph(10, 3, torch.tanh)

    def f(x):
        return torch.tanh(W @ x @ A + B)

    solver = Broyden(memory=60)
    solution = fixed_point(f, torch.zeros(10, 3), solver=solver, adjoint=SHINE(refine=GMRES()))
    _, expected = dense(f, torch.zeros(10, 3), (W, B), g)
    for ours, theirs in zip(torch.autograd.grad(solution.value, (W, B), g), expected, strict=True):
        assert relative(ours, theirs) < digits(1e-8, 1e-4)
