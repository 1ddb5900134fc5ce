"""from_module: ordinary networks as StateSpaces, equal to float64 round-off, or refused with the place and the reason."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from implicitdl import ArgumentError, ImplicitModel, compress
from implicitdl.data import import_torchvision
from implicitdl.statespace import from_module, loop_gain
from precision import digits
from spaces import seeds


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def settled(net):
    """In eval mode, with statistics and weights of BatchNorm that do something."""
    for part in net.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return net.eval()


def same(net, *features, batch=3):
    """Converts on two samples, compares on others and on one alone, and returns the model."""
    net = net.to(torch.get_default_dtype())  # parameters at the head of a file are made before the fixture sets it
    close = digits(1e-9, 1e-5)
    with torch.no_grad():
        space = from_module(net, torch.randn(2, *features))
        u = 2 * torch.randn(batch, *features)
        expected = net(u.clone()).reshape(batch, -1)
        assert torch.allclose(space(u), expected, rtol=0, atol=close)
        assert torch.allclose(space(u[:1]), expected[:1], rtol=0, atol=close)
    return space


def substituted(space):
    """Every block needs only blocks behind it: A is strictly block upper triangular."""
    edges = torch.tensor(space.sizes).cumsum(0)
    rows, columns = space.A.indices()
    return bool((torch.bucketize(rows, edges, right=True) < torch.bucketize(columns, edges, right=True)).all())


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.2), nn.MaxPool2d(3, 2, padding=1), nn.Dropout2d(),
        nn.Flatten(), nn.Linear(24, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(), nn.Linear(10, 5),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block, as torchvision's: in place, and with a shortcut that changes the size."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        return self.relu(out)


class Recurrent(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 4, batch_first=True, **options), nn.LazyLinear(2)

    def forward(self, x):
        states, last = self.rnn(x)
        return self.head(torch.cat((states[:, 0], states.flatten(1), last[-1]), 1))


class Stepping(nn.Module):
    """A recurrence written out, with an optional argument."""

    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(3, 4)

    def forward(self, x, h=None):
        h = x.new_zeros(x.size(0), 4) if h is None else h
        for t in range(5):
            h = self.cell(x[:, t], h)
        return 1 - h


# ---- networks


def test_mlp():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Sigmoid(), nn.Identity(), nn.Linear(5, 3))
    space = same(net, 4)
    assert [(block.activation.name, block.size) for block in space.blocks] == [("sigmoid", 5), ("relu", 6)]
    assert torch.equal(space.A.to_dense()[:5, 5:], net[2].weight)
    assert torch.equal(space.B.to_dense()[5:], net[0].weight)
    assert torch.equal(space.C.to_dense()[:, :5], net[5].weight)


def test_lenet_with_batch_norm_and_max_pool():
    space = same(settled(lenet()), 1, 10, 10)
    assert substituted(space)
    # Pools of 2 × 2: three states for each of 4 · 25 outputs, and of 6 · 4, where padding leaves 2 × 2 of 3 × 3.
    assert space.n == 400 + 3 * 100 + 54 + 3 * 24 + 10
    u = torch.randn(2, 1, 10, 10)
    solution = space.solve(u)
    assert bool((solution.steps == 1).all())
    z = space.pre_activation(solution.value, u.flatten(1))
    assert torch.allclose(solution.value, space.activation.phi(z), rtol=0, atol=digits(1e-12, 1e-5))
    assert loop_gain(space) == 0


def test_residual_net():
    net = settled(nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(4, 4, 1), Block(4, 6, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ))  # fmt: skip
    assert substituted(same(net, 3, 16, 16))


class Mixed(nn.Module):
    """Concatenations, residuals and constants, by modules, functions and methods."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        h = torch.cat((x, self.first(x).relu()), dim=1)
        h = self.second(F.hardtanh(h, -0.5, 1.5)) * 0.5 - x / 3
        return torch.cat((h.mean((2, 3)), torch.tanh(h)[:, :, 1, -1], h.view(h.size(0), -1)), 1)


def test_residuals_and_concatenations():
    assert substituted(same(Mixed(), 2, 4, 5))


@pytest.mark.parametrize(
    "options",
    [{}, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}, {"bias": False, "num_layers": 2}],
    ids=["tanh", "relu, two layers, both ways", "no bias"],
)
def test_unrolled_rnn(options):
    net = Recurrent(**options)
    net(torch.randn(2, 5, 3))
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    space = same(net, 5, 3)
    assert space.n == layers * 5 * 4
    assert substituted(space)


def test_recurrence_written_out():
    assert same(Stepping(), 5, 3).n == 20


def test_implicit_model_inside():
    implicit = ImplicitModel(6, 4, 5, bias=True, tol=digits(1e-13, 1e-6))
    with torch.no_grad():
        implicit.A.mul_(4)
    net = nn.Sequential(nn.Conv1d(1, 1, 2), nn.ReLU(), implicit, nn.Tanh(), nn.Linear(4, 2))
    space = same(net, 1, 7)
    assert space.sizes == (4, 5, 6)
    assert torch.equal(space.A.to_dense()[4:9, 4:9], implicit.statespace().A)
    assert loop_gain(space) < 1


def test_a_module_that_is_a_leaf_itself():
    same(nn.Linear(3, 2), 3)
    same(settled(nn.BatchNorm1d(3)), 3)
    same(ImplicitModel(3, 2, 4, tol=digits(1e-13, 1e-6)), 3)


@pytest.mark.parametrize(
    ("build", "side"),
    [
        (lambda models: models.ShuffleNetV2([1, 1, 1], [4, 4, 8, 8, 16], num_classes=4), 32),
        (lambda models: models.DenseNet(4, (2, 2), 4, num_classes=3), 32),
    ],
    ids=["shufflenet", "densenet"],
)  # fmt: skip
def test_small_networks_of_torchvision(build, side):
    import_torchvision()
    from torchvision import models

    assert substituted(same(settled(build(models)), 3, side, side))


@pytest.mark.float64
@pytest.mark.long
def test_resnet18():
    import_torchvision()
    from torchvision.models import resnet18

    space = same(settled(resnet18()), 3, 32, 32)
    assert substituted(space)
    print(f"\n{space}: {sum(24 * M._nnz() for M in space.matrices) / 2**20:.0f} MiB")


# ---- layers


OPTION = st.integers(1, 3)


@given(seeds, st.lists(st.tuples(OPTION, OPTION, st.integers(0, 2), OPTION), min_size=1, max_size=2), OPTION, OPTION,
       OPTION, st.booleans(), st.integers(4, 7), st.sampled_from(["zeros", "circular", "replicate", "reflect"]))  # fmt: skip
def test_convolutions(seed, axes, groups, inside, out, bias, side, mode):
    torch.manual_seed(seed)
    kernel, stride, padding, dilation = zip(*axes, strict=True)
    assume(all(side + 2 * p > d * (k - 1) for k, _, p, d in axes))
    build = (nn.Conv1d, nn.Conv2d)[len(axes) - 1]
    net = build(
        groups * inside, groups * out, kernel, stride, padding, dilation, groups=groups, bias=bias, padding_mode=mode
    )
    same(net, groups * inside, *[side + k for k in range(len(axes))])


@settings(deadline=None, max_examples=15)
@given(seeds, st.integers(1, 2), st.integers(1, 4), OPTION, st.integers(0, 2), st.integers(1, 2), st.booleans(),
       st.booleans(), st.integers(5, 8))  # fmt: skip
def test_poolings(seed, dims, kernel, stride, padding, dilation, ceil_mode, count_include_pad, side):
    torch.manual_seed(seed)
    assume(2 * padding <= kernel and side + 2 * padding > dilation * (kernel - 1))
    sizes = [side + k for k in range(dims)]
    largest = (nn.MaxPool1d, nn.MaxPool2d)[dims - 1](kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    mean = (nn.AvgPool1d, nn.AvgPool2d)[dims - 1](kernel, stride, padding, ceil_mode, count_include_pad)
    adaptive = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[dims - 1](kernel)
    for net in (largest, mean, adaptive):
        same(net, 2, *sizes)


def test_a_window_of_k_entries_costs_k_minus_1_states():
    assert same(nn.MaxPool2d(2), 1, 2, 2).sizes == (1, 2)
    assert same(nn.MaxPool2d((3, 5)), 2, 3, 5).sizes == (2, 4, 8, 14)


def test_max_pool_of_negative_values_at_the_border():
    net = nn.MaxPool2d(3, 1, 1)
    space = from_module(net, torch.zeros(1, 1, 3, 3))
    u = -1 - torch.rand(4, 1, 3, 3)
    assert torch.allclose(space(u), net(u).flatten(1), rtol=0, atol=1e-14)


FUNCTIONS = {
    "same": nn.Conv2d(3, 2, (2, 4), padding="same", dilation=(1, 2)),
    "valid": nn.Conv2d(3, 2, 3, padding="valid"),
    "divisor": nn.AvgPool2d(2, divisor_override=3),
    "adaptive, one side kept": nn.AdaptiveAvgPool2d((3, None)),
    "linear on the last dimension": nn.Linear(4, 2),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-2.0, 0.5),
    "activations": Function(lambda x: F.silu(x) + F.gelu(x) + F.elu(x) + F.softplus(x) + F.leaky_relu(x, 0.3)),
    "methods": Function(lambda x: x.relu() + x.tanh() - x.sigmoid()),
    "clamp": Function(lambda x: x.clamp(min=0.1) + torch.clamp(x, -0.3, 0.2) + x.clamp(max=0.3)),
    "in place": Function(lambda x: (x.tanh_(), x + x.sigmoid_())[1]),
    "in place by argument": Function(lambda x: F.leaky_relu(x, 0.2, True)),
    "constants": Function(lambda x: 2 - (3 * x - torch.arange(4.0)) / torch.full((3, 1, 1), 2.0) + torch.rsub(x, 1)),
    "broadcasting": Function(lambda x: x - x.mean((2, 3), keepdim=True) + x.sum(-1, keepdim=True)),
    "alpha": Function(lambda x: torch.add(x, x.relu(), alpha=2) - torch.sub(1, x, alpha=3)),
    "matrix": Function(lambda x: x @ torch.arange(8.0).reshape(4, 2)),
    "view": Function(lambda x: x.view(-1, 48)),
    "shape": Function(lambda x: x.reshape(x.shape[0], 6, x.shape[1] - 1, -1).transpose(1, 2).permute(0, 3, 1, 2)),
    "parts": Function(lambda x: torch.cat((x.chunk(2, 2)[1], x.split(3, 2)[0], x.unsqueeze(1)[:, 0, :, 1:3]), 2)),
    "stack": Function(lambda x: torch.stack((x, -x.flip(1)), 1)),
    "unflatten": nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 12))),
    "cat of a constant": Function(lambda x: torch.cat((x, x.new_zeros(x.size(0), 1, 4, 4) + 1), 1)),
    "pad": Function(lambda x: F.pad(x, (1, 2, 0, 1), value=2.0) + F.pad(x, (2, 1, 1, 0), mode="reflect")),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # with an odd total, which is the point
@pytest.mark.parametrize("net", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_functions(net):
    same(net, 3, 4, 4)


SCALARS = {
    "times": lambda x: x * 0.1,
    "plus": lambda x: x + 0.1,
    "minus": lambda x: 0.3 - x,
    "by": lambda x: x / 3,
    "by an integer tensor": lambda x: x / torch.tensor(3),
    "clamp": lambda x: x.clamp(-0.7, 0.3),
    "relu6": F.relu6,
    "alpha": lambda x: torch.add(x, x, alpha=0.1),
    "pad": lambda x: F.pad(x, (1, 0), value=0.1),
}


@pytest.mark.parametrize("function", SCALARS.values(), ids=SCALARS.keys())
def test_numbers_are_not_rounded_to_the_default_dtype(function, float32):
    u = 5 * torch.randn(4, 6, dtype=torch.float64)
    space = from_module(Function(function), u)
    assert space.dtype == torch.float64
    torch.testing.assert_close(space(u), function(u), rtol=0, atol=1e-14)


class Rounded(nn.Module):
    """A factor that tracing sees otherwise than running does, by what float32 rounds away."""

    def forward(self, x):
        return x * (0.1 if isinstance(x, torch.Tensor) else float(torch.tensor(0.1, dtype=torch.float32)))


@pytest.mark.float64
def test_a_function_that_is_off_by_the_rounding_of_float32_is_refused():
    with pytest.raises(ArgumentError, match=r"got outputs that differ by \d\.\d*e-0[89]"):
        from_module(Rounded(), torch.randn(4, 6))


# ---- what the model is


def test_algebra_composes_with_it():
    f = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten())
    g = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    u = torch.randn(3, 1, 6)
    both = from_module(g, f(u)) @ from_module(f, u)
    assert torch.allclose(both(u), g(f(u)), rtol=0, atol=digits(1e-12, 1e-5))
    assert both.sizes == from_module(nn.Sequential(f, g), u).sizes


def test_gradients_reach_the_parameters_and_the_input():
    net, u = settled(lenet()), torch.randn(2, 1, 10, 10, requires_grad=True)
    weights = [*net.parameters(), u]
    direction = torch.randn(2, 5)
    found = torch.autograd.grad((from_module(net, u.detach())(u) * direction).sum(), weights)
    expected = torch.autograd.grad((net(u) * direction).sum(), weights)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=digits(1e-9, 1e-3), atol=digits(1e-10, 1e-4))


def test_the_matrices_are_copies_and_the_module_is_left_alone():
    net = settled(lenet())
    before, names = {k: v.clone() for k, v in net.state_dict().items()}, set(vars(net))
    u = torch.randn(2, 1, 10, 10)
    space = from_module(net, u).detach()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert set(vars(net)) == names
    y = space(u)
    nn.init.zeros_(net[0].weight)
    assert torch.equal(space(u), y)
    assert torch.equal(pickle.loads(pickle.dumps(space))(u), y)
    assert torch.allclose(space.to_dense()(u), y, rtol=0, atol=digits(1e-12, 1e-5))


def test_float32():
    net, u = settled(lenet()).float(), torch.randn(4, 1, 10, 10, dtype=torch.float32)
    space = from_module(net, u)
    assert space.dtype == torch.float32
    assert torch.allclose(space(u), net(u), rtol=1e-4, atol=1e-5)


def test_compressing_ordinary_layers_with_implicit_ones():
    stack = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), ImplicitModel(4, 5, 6, tol=digits(1e-13, 1e-6)), nn.ReLU(), nn.Linear(5, 2)
    )
    one, u = compress(stack), torch.randn(7, 3)
    assert one.hidden_dim == 4 + 6 + 5
    assert torch.allclose(one(u), stack(u), rtol=0, atol=digits(1e-8, 1e-4))


# ---- what has no implicit form


def inside(*parts):
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(*parts))


class First(nn.Module):
    """The first of a module's outputs."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x):
        return self.of(x)[0]


REFUSED = {
    "softmax": (inside(nn.Softmax(-1)), "Softmax at '1.0': each of its outputs depends on all inputs of a sum"),
    "layer norm": (inside(nn.ReLU(), nn.LayerNorm(4)), "LayerNorm at '1.1': it divides by a statistic of its own input"),
    "attention": (
        inside(nn.Unflatten(1, (1, 4)), nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)).eval(),
        "TransformerEncoderLayer at '1.1': it multiplies values that depend on the input",
    ),
    "lstm": (nn.Sequential(nn.Unflatten(1, (2, 2)), First(nn.LSTM(2, 3))), "LSTM at '1.of': it multiplies values"),
    "functional softmax": (inside(Function(lambda x: x.softmax(1))), "Function at '1.0': each of its outputs depends"),
    "product": (inside(Function(lambda x: x * x.relu())), "Function at '1.0': a product of two values"),
    "quotient": (Function(lambda x: 1 / x), "Function at the module itself: a quotient by a value"),
    "matrix product": (Function(lambda x: x @ x.t() @ x), "it does not keep the samples apart"),
    "weights from the input": (Function(lambda x: F.linear(x, x)[:, :1]), "its weights depend on the input"),
    "unknown": (Function(torch.exp), "there is no rule for exp. Convert the parts before and after it."),
    "control flow": (
        inside(Function(lambda x: x if x.sum() > 0 else -x)), "Function at '1.0': its control flow or its numbers depend"
    ),
    "numbers": (Function(lambda x: x * math_of(x)), "its control flow or its numbers depend on the data"),
    "option": (Function(lambda x: F.elu(x, 2.0)), "elu is known with torch's default alpha only. Leave it at that."),
    "other option": (Function(lambda x: x.sum(1, dtype=torch.float64)), "sum is not known with these options"),
    "indices": (
        Function(lambda x: F.max_pool1d(x.unsqueeze(1), 2, return_indices=True)[0]), "there is no rule for max_pool1d_with"
    ),
    "no channels": (nn.MaxPool1d(2), "a batch of images without channels"),
    "training, batch norm": (inside(nn.BatchNorm1d(4)), "BatchNorm1d at '1.0': it is in training mode. Call eval()"),
    "training, dropout": (inside(nn.Dropout()), "Dropout at '1.0': it is in training mode. Call eval()"),
    "functional dropout": (Function(F.dropout), "dropout in training mode is random. Give it training=self.training"),
    "batch statistics": (
        nn.BatchNorm1d(4, track_running_stats=False).eval(), "BatchNorm without running statistics"
    ),
    "mean over the batch": (Function(lambda x: x - x.mean()), "it sums over the batch"),
    "samples in another order": (Function(lambda x: x.flip(0)), "it does not keep the samples apart"),
    "batch by number": (Function(lambda x: x.view(2, 2, 2).flatten(1)), "it does not keep the samples apart|followed"),
    "constant by sample": (Function(lambda x: x + torch.ones(2, 4)), "Function at the module itself: it cannot be followed"),
    "constants that differ": (
        Function(lambda x: x + (x.new_zeros(x.size(0), 4) + 1).cumsum(0)), "a constant that differs from sample"
    ),
    "recurrence, batch second": (
        nn.Sequential(nn.Unflatten(1, (2, 2)), First(nn.RNN(2, 3))), "its samples do not come first. Build it with batch_first"
    ),
    "batch size as a number": (Function(lambda x: x / x.size(0)), "taken one by one, describe, got outputs that differ"),
    "two outputs": (Function(lambda x: (x, x)), "a module that returns one tensor of shape .batch=2, .any., got tuple"),
    "sums over samples": (Function(lambda x: x.sum(0)), "one tensor of shape .batch=2, .any., got .4,."),
    "no module": (torch.relu, "from_module: expected a torch.nn.Module, got builtin"),
}  # fmt: skip


def math_of(x):
    return float(x.sum())


@pytest.mark.parametrize(("net", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_form_is_named(net, message):
    with pytest.raises(ArgumentError, match=message):
        from_module(net.to(torch.get_default_dtype()) if isinstance(net, nn.Module) else net, torch.randn(2, 4))


@pytest.mark.parametrize("u", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, dtype=torch.int64), [1.0]])
def test_example_input_is_checked(u):
    with pytest.raises(ArgumentError, match=re.escape("example_input to be a floating-point tensor")):
        from_module(nn.Linear(3, 2), u)


@pytest.mark.float64
def test_an_example_that_the_module_does_not_take():
    with pytest.raises(
        ArgumentError, match=r"a module that takes inputs of shape \(2, 5\), got one that does not \(mat1"
    ):
        from_module(nn.Linear(3, 2), torch.randn(2, 5))
    with pytest.raises(ArgumentError, match=r"Pass an example_input of its shape, dtype and device\."):
        from_module(nn.Linear(3, 2), torch.randn(2, 3, dtype=torch.float32))
