"""from_module on what is written in place, seen through views, or affine without a rule of its own: exact, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from implicitdl import ArgumentError, ImplicitModel
from implicitdl.statespace import from_module
from precision import digits


class Function(nn.Module):
    """A function as a module, with weights of its own."""

    def __init__(self, f, *shapes):
        super().__init__()
        self.f = f
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, x):
        return self.f(x, *self.weights)


def default(net):
    """In torch's default dtype, whichever it was when the net was built."""
    return net.to(torch.get_default_dtype())


def same(net, *features):
    """Converts by an example that no branch acts on, and compares where all do."""
    net = default(net).eval()
    space = from_module(net, torch.rand(2, *features))
    u = 3 * torch.randn(6, *features)
    expected = net(u.clone()).reshape(6, -1)
    close = digits(1e-9, 1e-5)
    torch.testing.assert_close(space(u), expected, rtol=close, atol=close)
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    direction = torch.randn_like(expected)
    if trained:
        found = torch.autograd.grad((space(u) * direction).sum(), trained, allow_unused=True, materialize_grads=True)
        right = torch.autograd.grad((expected * direction).sum(), trained, allow_unused=True, materialize_grads=True)
        close = digits(1e-7, 1e-4)
        torch.testing.assert_close(found, right, rtol=close, atol=close)
    return space


# ---- in place, and seen through views


def pair_of_halves(x):
    x = x * 1
    first, second = x.chunk(2, 1)
    first.relu_()
    second += first
    return x


def kept_copy(x):
    skip = x.clone()
    F.leaky_relu(x, 0.2, inplace=True)
    return skip + 2 * x


def kept_alias(x):
    skip = x.view(-1, 2, 4)
    F.leaky_relu(x, 0.2, inplace=True)
    return skip.flatten(1) + 2 * x


def through_a_permutation(x):
    x = x.view(-1, 2, 4)
    x.transpose(1, 2)[:, 1:3].mul_(-2).relu_()
    return x


def copies_do_not_write_back(x):
    x.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8).relu_()
    return x


def reshape_that_is_a_view(x):
    x.reshape(-1, 2, 4).relu_()
    return x


def after_an_operation_that_keeps_strides(x):
    y = x.view(-1, 2, 4).transpose(1, 2).tanh()
    y.transpose(1, 2).reshape(-1, 8).relu_()
    z = x.view(-1, 2, 4).transpose(1, 2).tanh()
    z.reshape(-1, 8).relu_()
    return torch.cat((y.flatten(1), z.flatten(1)), 1)


def one_part_into_another(x):
    x = x * 1
    x[:, :4].copy_(x[:, 4:])
    x[:, 6].zero_()
    return x.sub_(1)


def unbound(x):
    x = x * 1
    parts = x.view(-1, 2, 4).split(1, 2)
    parts[1].add_(1).clamp_(min=0)
    parts[3].div_(2).neg_()
    return x


def diagonal(x):
    x = x.view(-1, 2, 2, 2) * 1
    x.diagonal(0, 2, 3).relu_()
    return x


def operators(x):
    x = x * 1
    kept, whole = x, x.view(-1, 2, 4)
    x += 1
    x *= torch.arange(8.0) - 3
    x /= 2
    x -= kept.relu()
    return whole.flatten(1) + kept


IN_PLACE = {
    "operators": operators,
    "a view": lambda x: (x.view(-1, 2, 4).relu_(), x)[1],
    "the input": lambda x: (x.relu_(), x - 1)[1],
    "halves": pair_of_halves,
    "a clone": kept_copy,
    "an alias": kept_alias,
    "a permutation": through_a_permutation,
    "a copy": copies_do_not_write_back,
    "a reshape": reshape_that_is_a_view,
    "strides": after_an_operation_that_keeps_strides,
    "overlapping parts": one_part_into_another,
    "parts of a view": unbound,
    "a diagonal": diagonal,
    "detours": lambda x: (x.flatten(1).contiguous().to(x.dtype).squeeze(-1).relu_(), x)[1],
    "a slice of a slice": lambda x: (x[:, 1:7][:, ::2].sigmoid_(), x)[1],
    "windows": lambda x: (x.unfold(1, 2, 2)[..., 0].tanh_(), x)[1],
}  # fmt: skip


@pytest.mark.parametrize("f", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_writing_in_place_is_seen_wherever_torch_lets_it_be_seen(f):
    same(Function(f), 8)


def test_a_skip_connection_around_activations_in_place():
    class Skip(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.lin, self.act, self.keep = nn.Linear(8, 8), nn.LeakyReLU(0.2, inplace=True), keep

        def forward(self, x):
            skip = self.keep(x)
            return skip + self.lin(self.act(x))

    for keep in (torch.clone, lambda x: x, lambda x: x.view(-1, 8), lambda x: x.contiguous(), lambda x: x + 0):
        same(Skip(keep), 8)


REFUSED = {
    "into a constant": (Function(lambda x: x + x.new_zeros(x.shape[0], 8).copy_(x)), "copy_ writes into a tensor that is not the one it returns, or that does not depend"),
    "out": (Function(lambda x: torch.add(x, x, out=x)), "add is not known with these options|'out'"),
    "a slice assigned": (Function(lambda x: x.__setitem__((slice(None), 0), 0) or x), "Function at the module itself"),
    "a shape changed": (Function(lambda x: x.unsqueeze_(1)), "changes the shape of a tensor in place"),
    "another threshold": (Function(lambda x: torch.where(x > 100, x, -x)), "there is no rule for gt"),
    "hard swish": (nn.Hardswish(), "there is no rule for hardswish"),
    "hard shrink": (nn.Hardshrink(), "there is no rule for hardshrink"),
    "a threshold": (nn.Threshold(50.0, 0.0), "there is no rule for _threshold"),
    "a branch": (Function(lambda x: x if x.max() < 1e9 else -x), "its control flow or its numbers depend on the data"),
    "a branch on the batch": (Function(lambda x: x if x.shape[0] < 99 else -x), "its control flow or its numbers depend"),
    "a hidden branch": (Function(lambda x: -x if isinstance(x, torch.Tensor) and x.min() < 0 else x), "outputs that differ"),
    "detached": (Function(lambda x: x + x.detach()), "it keeps gradients from the weights before it"),
    "data": (Function(lambda x: x + x.data), "its data is not followed"),
    "another dtype": (Function(lambda x: x.float().double()), "there is no rule for (float|double)"),
    "product by einsum": (Function(lambda x: torch.einsum("bi,bj->bij", x, x)), "it is not affine in the values"),
    "product by bmm": (Function(lambda x: x.view(-1, 2, 4).bmm(x.view(-1, 4, 2))), "it is not affine in the values"),
    "the largest with its place": (Function(lambda x: x.max(1)[0]), "there is no rule for max"),
    "batch flattened": (Function(lambda x: x.view(4, -1, 2).flip(0).view(-1, 8)), "samples apart|takes inputs|followed"),
    "squared by a hook": (nn.Softplus(beta=2.0), "softplus.threshold=20. is known with torch's default beta only"),
    "random": (Function(lambda x: x + torch.rand(8)), "got outputs that differ by"),
    "training, instance norm": (nn.InstanceNorm1d(2, track_running_stats=True).train(), "it is in training mode"),
    "instance norm": (nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2)).eval(), "statistics of its own input"),
    "training, spectral norm": (parametrizations.spectral_norm(nn.Linear(8, 2)), "it is in training mode"),
}  # fmt: skip


@pytest.mark.parametrize(("net", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_followed_is_refused_in_words(net, message):
    with pytest.raises(ArgumentError, match=message):
        from_module(default(net), torch.rand(2, 8))


# ---- what is affine, or exact by ReLU


def image(*parts):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), *parts)


def with_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


AFFINE = {
    "nearest": (nn.Upsample(scale_factor=2), (2, 3, 4)),
    "bilinear": (image(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)), (2, 3, 4)),
    "bicubic": (nn.Upsample((5, 7), mode="bicubic"), (2, 3, 4)),
    "linear": (nn.Upsample(7, mode="linear"), (2, 3)),
    "trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 3, 2)),
    "antialiased": (Function(lambda x: F.interpolate(x, (2, 3), mode="bilinear", antialias=True)), (2, 5, 6)),
    "area": (Function(lambda x: F.interpolate(x, (2, 3), mode="area")), (2, 5, 6)),
    "3-d": (nn.Sequential(nn.Conv3d(2, 4, 2, 2, 1, groups=2), nn.ReLU(), nn.MaxPool3d(2), nn.AvgPool3d(1)), (2, 4, 5, 3)),
    "3-d transposed": (nn.ConvTranspose3d(2, 3, 2, 2), (2, 2, 2, 2)),
    "adaptive": (nn.Sequential(nn.AdaptiveAvgPool3d((2, 2, 1)), nn.AdaptiveMaxPool3d((1, 2, 1))), (2, 3, 4, 2)),
    "adaptive max": (nn.AdaptiveMaxPool2d((2, None)), (2, 5, 3)),
    "adaptive max in 1-d": (nn.AdaptiveMaxPool1d(3), (2, 7)),
    "shuffles": (nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2)), (4, 2, 3)),
    "unfold and fold": (nn.Sequential(nn.Unfold(2, padding=1), nn.ReLU(), nn.Fold((3, 4), 2, padding=1)), (2, 3, 4)),
    "instance norm": (image(with_statistics(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))), (2, 3, 4)),
    "slopes": (image(nn.PReLU(4), nn.PReLU(), nn.LeakyReLU(0.3), nn.RReLU()), (2, 3, 4)),
    "pieces": (image(nn.Softshrink(), nn.Hardsigmoid(), nn.Tanhshrink(), nn.CELU(), nn.Hardtanh()), (2, 3, 4)),
    "ends": (Function(lambda x: x.clip(-1, 2) + x.clamp_min(0.5) - torch.clamp_max(x, 0.2) + x.clip(float("-inf"), 1)), (5,)),
    "ends that meet": (Function(lambda x: x.clamp(1, 1) + x.clamp(2, 1) + x), (5,)),
    "ends by entry": (Function(lambda x: x.clamp(torch.arange(5.0) - 2, torch.arange(5.0) - 1)), (5,)),
    "the larger": (Function(lambda x: torch.maximum(x, x.flip(1)) + torch.minimum(x.tanh(), torch.zeros(5)) + x.abs()), (5,)),
    "names": (Function(lambda x: torch.hstack((x, torch.concat((x, -x), 1), torch.concatenate((x, x), dim=-1)))), (5,)),
    "axes": (Function(lambda x: x.swapaxes(1, 2).mT.movedim(1, 2).diagonal(0, 1, 2) + x.swapdims(1, 2)[:, 0]), (3, 3)),
    "weights": (Function(lambda x, W: torch.einsum("bij,jk->bki", x, W).relu(), (4, 2)), (3, 4)),
    "matrices": (Function(lambda x, W, V: torch.matmul(W, x) @ V + F.linear(x[:, :2], V.t()), (2, 3), (4, 2)), (3, 4)),
    "bilinear in a constant": (Function(lambda x, w, W: F.bilinear(x, w.expand(len_of(x), 3), W), (3,), (2, 4, 3)), (4,)),
    "sums": (Function(lambda x: x.cumsum(1) + x.roll(1, 1) + torch.lerp(x, x.relu(), 0.25) + x.tile(1, 1)), (5,)),
    "differences": (Function(lambda x: x.diff(dim=1).repeat_interleave(2, 1) + x[:, [0, 2, 1, 3, 3, 0, 1, 2]]), (5,)),
    "chosen": (Function(lambda x: torch.where(torch.arange(5) > 2, x.relu(), -x).masked_fill(torch.arange(5) == 1, 7.0)), (5,)),
    "triangles": (Function(lambda x: x.tril() - x.triu(1).relu()), (3, 3)),
}  # fmt: skip


def len_of(x):
    return x.shape[0]


@pytest.mark.parametrize(("net", "features"), AFFINE.values(), ids=AFFINE.keys())
def test_what_is_exact_is_converted(net, features):
    same(net, *features)


@pytest.mark.parametrize("seed", range(12))
def test_transposed_convolutions(seed):
    g, dims = torch.Generator().manual_seed(seed), 1 + seed // 6

    def draw(low, high):
        return [int(torch.randint(low, high, (), generator=g)) for _ in range(dims)]

    kernel, stride, dilation = draw(1, 4), draw(1, 4), draw(1, 3)
    padding = [min(p, d * (k - 1)) for p, d, k in zip(draw(0, 3), dilation, kernel, strict=True)]
    output_padding = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    groups, build = seed % 2 + 1, (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
    same(
        build(2 * groups, 3 * groups, kernel, stride, padding, output_padding, groups, seed % 3 > 0, dilation),
        2 * groups, *[3 + k for k in range(dims)],
    )  # fmt: skip


LAYERS = [
    lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.ConvTranspose2d(4, 4, 2, 1), lambda: nn.ReLU(inplace=True),
    lambda: nn.PReLU(4), lambda: nn.Tanh(), lambda: nn.MaxPool2d(2, 1), lambda: nn.AvgPool2d(2, 1),
    lambda: nn.Upsample(scale_factor=2, mode="bilinear"), lambda: nn.Upsample((4, 3)), lambda: nn.ChannelShuffle(2),
    lambda: with_statistics(nn.BatchNorm2d(4)), lambda: nn.AdaptiveMaxPool2d(3), lambda: nn.AdaptiveAvgPool2d((3, 4)),
    lambda: nn.Hardtanh(-0.5, 1, inplace=True), lambda: nn.Dropout2d(), lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
    lambda: Function(lambda x: (F.leaky_relu(x[:, ::2], 0.3, inplace=True), x)[1]), lambda: Function(lambda x: x + x.flip(1).relu()),
    lambda: Function(lambda x: torch.cat((x[:, 2:], x[:, :2].clamp(-1, 0.5)), 1)), lambda: nn.ELU(inplace=True),
    lambda: Function(lambda x, W: torch.einsum("bchw,cd->bdhw", x, W), (4, 4)),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(seed):
    torch.manual_seed(seed)
    chosen = torch.randint(len(LAYERS), (5,)).tolist()
    same(nn.Sequential(nn.AdaptiveAvgPool2d(4), *[LAYERS[k]() for k in chosen], nn.AdaptiveAvgPool2d(3)), 4, 4, 4)


# ---- weights that torch makes, wrappers, dtypes


def pruned(net):
    prune.random_unstructured(net[0], "weight", 0.5)
    prune.l1_unstructured(net[2], "weight", 0.4)
    return net


def doubled(net):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(net[0], "weight", Doubled())
    return net


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


WRAPPED = {
    "pruned": lambda: pruned(mlp()),
    "parametrized": lambda: doubled(mlp()),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh()),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh()),
    "data parallel": lambda: nn.DataParallel(mlp()),
    "compiled": lambda: torch.compile(mlp()),
    "wrapped inside": lambda: nn.Sequential(nn.DataParallel(mlp()), torch.compile(nn.Tanh())),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("build", WRAPPED.values(), ids=WRAPPED.keys())
def test_weights_in_effect_and_wrapped_modules(build):
    net, u = build().eval(), torch.randn(6, 4)
    space, inner = from_module(net, torch.rand(2, 4)), getattr(net, "module", getattr(net, "_orig_mod", net))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(space(u).detach(), inner(u), rtol=0, atol=digits(1e-9, 1e-6))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_modules_are_refused():
    for net in (torch.jit.script(mlp()), nn.Sequential(torch.jit.script(nn.Linear(4, 3)))):
        with pytest.raises(ArgumentError, match=r"TorchScript has compiled its operations away\. Pass the module"):
            from_module(net, torch.rand(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(ArgumentError, match=rf"torch.float32 or torch.float64, got {dtype}. Convert module.float\(\)"):
        from_module(mlp().to(dtype), torch.rand(2, 4, dtype=dtype))


def test_an_implicit_model_with_default_tolerances_inside():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), ImplicitModel(5, 3, 6), nn.Tanh())
    space, u = from_module(net, torch.rand(2, 4)), torch.randn(6, 4)
    torch.testing.assert_close(space(u), net(u), rtol=0, atol=1e-5)


def test_global_random_numbers_are_left_alone():
    net, state = mlp(), torch.get_rng_state()
    from_module(net, torch.zeros(2, 4))
    assert torch.equal(torch.get_rng_state(), state)
