"""States of a teacher: every spelling of an activation, every kind of network, in memory and on disk."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from implicitdl import ArgumentError, ImplicitModel
from implicitdl._internal.store import CheckpointError
from implicitdl.sim import get_states, load_states
from implicitdl.sim.matching import teacher_weights
from implicitdl.statespace import perron_weights
from precision import digits


class Spelled(nn.Module):
    """Two layers of ReLU with the activation as given."""

    def __init__(self, first, second):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)
        self.first, self.second = first, second

    def forward(self, u):
        return self.c(self.second(self.b(self.first(self.a(u)))))


def reused(z):
    """A ReLU whose input and output are both overwritten after it."""
    x = torch.relu(z)
    out = x.clone()
    x += 1.0
    z -= 1.0
    return out


SPELLINGS = {
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "method": lambda z: z.relu(),
    "method in place": lambda z: z.relu_(),
    "aten": lambda z: torch.ops.aten.relu.default(z),
    "overwritten": reused,
}


def by_hand(net, u):
    with torch.no_grad():
        z1 = net.a(u)
        z2 = net.b(z1.relu())
        y = net.c(z2.relu())
    Z = torch.cat([z2, z1], 1).t()
    return {"X": Z.relu(), "U": u.t(), "Z": Z, "Y": y.t()}


def assert_same(states, expected):
    assert states.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(states[name], value)


@pytest.mark.parametrize("second", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("first", [F.relu, nn.ReLU(inplace=True)], ids=["function", "module"])
def test_activations_are_seen_however_they_are_spelled(first, second):
    net, u = Spelled(first, second), torch.randn(6, 3)
    states = get_states(net, [u])
    assert_same(states, by_hand(net, u))
    assert [layer.features for layer in states.layers] == [4, 5]


@pytest.mark.parametrize(
    "phi",
    [
        torch.tanh, F.tanh, torch.sigmoid, F.silu, F.gelu, F.elu, F.softplus, F.hardtanh, F.leaky_relu, F.relu6, F.mish,
        lambda z: F.prelu(z, z.new_tensor([0.3])), nn.CELU(), nn.SELU(), nn.Hardswish(), nn.Threshold(0.1, 0.0),
    ],
)  # fmt: skip
def test_other_activations_are_seen(phi):
    net, u = Spelled(phi, F.relu), torch.randn(6, 3)
    states = get_states(net, [u], layers=[0])
    z = net.a(u).detach()
    torch.testing.assert_close(states["Z"], z.t())
    torch.testing.assert_close(states["X"], phi(z).detach().t())


class TestTeachers:
    def test_residual(self):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)
                self.act = nn.ReLU(inplace=True)

            def forward(self, u):
                h = self.act(self.a(u))
                return self.act(self.b(h) + h)

        net, u = Residual(), torch.randn(5, 3)
        states = get_states(net, [u])
        h = net.a(u).relu()
        torch.testing.assert_close(states["Z"], torch.cat([net.b(h) + h, net.a(u)], 1).t().detach())
        torch.testing.assert_close(states["Y"], states["X"][:4])

    def test_convolutional_states_are_flattened(self):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten())
        images = torch.rand(4, 1, 8, 8)
        states = get_states(net, [images])
        assert [layer.features for layer in states.layers] == [3 * 2 * 2, 2 * 6 * 6]
        z = net[0](images)
        torch.testing.assert_close(states["Z"][12:], z.flatten(1).t().detach())
        torch.testing.assert_close(states["U"], images.flatten(1).t())

    def test_an_implicit_model_is_one_layer(self):
        inner = ImplicitModel(4, 3, 6, bias=True)
        net, u = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), inner), torch.randn(5, 2)
        states = get_states(net, [u])
        assert [layer.features for layer in states.layers] == [6, 4]
        x = inner.solve(net[:2](u)).value.detach()
        torch.testing.assert_close(states["X"][:6], x.t(), rtol=digits(1e-6, 1e-4), atol=digits(1e-8, 1e-5))

    def test_an_implicit_model_alone(self):
        teacher, u = ImplicitModel(4, 3, 6), torch.randn(5, 4)
        states = get_states(teacher, [u])
        (A,) = teacher.weights()
        Z, Y = A @ states["X"] + teacher.B @ states["U"], teacher(u).t()
        for name, exact in (("Z", Z), ("Y", Y)):
            close = {"rtol": digits(1e-6, 1e-4), "atol": digits(1e-8, 1e-5)}
            torch.testing.assert_close(states[name], exact.detach(), **close)

    def test_exported_and_scripted(self, tmp_path):
        net, u = Spelled(F.relu, nn.ReLU()), torch.randn(6, 3)
        torch.export.save(torch.export.export(net, (u,)), tmp_path / "net.pt2")
        exported = torch.export.load(tmp_path / "net.pt2").module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            scripted = torch.jit.script(Spelled(nn.ReLU(), nn.ReLU()))
            scripted.load_state_dict(net.state_dict())
        for form in (exported, scripted):
            assert_same(get_states(form, [u]), by_hand(net, u))

    def test_the_fused_encoder_layer_is_opened(self):
        net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        states = get_states(net, [torch.randn(3, 4, 8)])
        assert [layer.function for layer in states.layers] == ["relu"]
        assert torch.backends.mha.get_fastpath_enabled()

    def test_batch_norm_and_dropout_are_those_of_evaluation_and_the_teacher_is_left_as_it_was(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2)).train()
        net[0].eval()
        before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
        u = torch.randn(6, 3)
        states = get_states(net, [u])
        assert [m.training for m in net.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert all(parameter.requires_grad for parameter in net.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        torch.testing.assert_close(states["Y"], net.eval()(u).detach().t())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_it_runs_in_its_own_dtype_and_the_states_are_cast(self, dtype):
        net, u = Spelled(F.relu, F.relu).to(dtype), torch.randn(6, 3)
        states = get_states(net, [u], dtype=torch.float64)
        expected = by_hand(net, u.to(dtype))
        assert_same(states, {name: value.double() for name, value in expected.items()})
        assert get_states(net, [u])["X"].dtype == torch.float32

    @pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, False)])
    def test_biases_are_noticed(self, bias, affine):
        net = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.ReLU(), nn.Linear(4, 2, bias=False))
        assert get_states(net, [torch.randn(2, 3)]).affine is affine


class TestLayers:
    @pytest.fixture
    def net(self):
        def block():
            return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())

        return nn.Sequential(block(), block(), block(), nn.Linear(4, 2))

    @pytest.mark.parametrize(
        ("choice", "names"),
        [
            ({}, ["2.3", "2.1", "1.3", "1.1", "0.3", "0.1"]),
            ({"layers": ["1"]}, ["1.3", "1.1"]),
            ({"layers": ["2.1", "0.3"]}, ["2.1", "0.3"]),
            ({"layers": [0, 5]}, ["2.3", "0.1"]),
            ({"layers": [3, "1.3", "0"]}, ["1.3", "0.3", "0.1"]),
            ({"skip_layers": 3}, ["2.3", "1.3", "0.3"]),
            ({"skip_layers": 4}, ["2.3", "2.1", "1.3", "1.1", "0.3", "0.1"]),
        ],
    )
    def test_choice(self, net, choice, names):
        states = get_states(net, [torch.randn(3, 4)], **choice)
        assert [layer.module for layer in states.layers] == names
        assert states["Z"].shape == (4 * len(names), 3)

    def test_an_activation_of_ones_own_by_the_name_of_its_module(self):
        class Squash(nn.Module):
            def forward(self, z):
                return z / (1 + z.abs()) + 0.1 * torch.tanh(z)

        net, u = nn.Sequential(nn.Linear(3, 4), Squash(), nn.Linear(4, 2)), torch.randn(5, 3)
        states = get_states(net, [u], layers=["1"])
        torch.testing.assert_close(states["X"], net[:2](u).t().detach())
        torch.testing.assert_close(states["Z"], net[0](u).t().detach())
        assert str(states.layers[0]) == "'1' (Squash)"

    def test_a_module_called_twice_is_two_layers(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.lin, self.act = nn.Linear(3, 3), nn.ReLU()

            def forward(self, u):
                return self.act(self.lin(self.act(self.lin(u))))

        assert [layer.module for layer in get_states(Twice(), [torch.randn(2, 3)]).layers] == ["act", "act"]


class TestLoaders:
    def test_transforms_are_the_loaders_own(self):
        u = torch.rand(10, 3)
        data = TensorDataset(u, torch.arange(10))

        def collate(samples):
            return 2 * torch.stack([sample[0] for sample in samples]), [sample[1] for sample in samples]

        net = Spelled(F.relu, F.relu)
        states = get_states(net, DataLoader(data, batch_size=4, collate_fn=collate))
        assert_same(states, by_hand(net, 2 * u))

    @pytest.mark.parametrize("sizes", [(10,), (4, 4, 2), (1,) * 10], ids=str)
    def test_batches_do_not_matter(self, sizes):
        net, u = Spelled(F.relu, F.relu), torch.rand(10, 3)
        assert_same(get_states(net, u.split(sizes)), by_hand(net, u))

    def test_the_input_is_not_changed_by_a_teacher_that_works_in_place(self):
        u = torch.randn(4, 3)
        before = u.clone()
        states = get_states(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), [u])
        assert torch.equal(u, before)
        torch.testing.assert_close(states["U"], states["Z"])


class TestDisk:
    def test_streamed_states_are_those_in_memory(self, tmp_path):
        net, u = Spelled(F.relu, F.relu), torch.rand(10, 3)
        states = get_states(net, u.split(4), path=tmp_path / "new" / "states")
        again = load_states(tmp_path / "new" / "states")
        for found in (states, again):
            assert_same(found, by_hand(net, u))
        assert again.layers == states.layers
        assert (again.affine, again.batch_shape) == (True, (4, 3))
        assert np.load(tmp_path / "new" / "states" / "X.npy", allow_pickle=False).shape == (9, 10)

    def test_beyond_the_room_in_memory_they_are_in_temporary_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        net, u = Spelled(F.relu, F.relu), torch.rand(10, 3)
        states = get_states(net, u.split(3), max_memory=300)
        assert_same(states, by_hand(net, u))
        assert list(tmp_path.iterdir()) == []  # they have no names

    def test_working_in_place_on_mapped_states_leaves_the_files(self, tmp_path):
        get_states(Spelled(F.relu, F.relu), [torch.rand(4, 3)], path=tmp_path / "s")["X"].zero_()
        assert bool(load_states(tmp_path / "s")["X"].any())

    def test_states_are_not_written_over(self, tmp_path):
        net, u = Spelled(F.relu, F.relu), torch.rand(4, 3)
        get_states(net, [u], path=tmp_path / "s")
        with pytest.raises(ArgumentError, match=r"expected a new folder.*got states in it"):
            get_states(net, [u], path=tmp_path / "s")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "X.npy").write_text("mine")
        with pytest.raises(ArgumentError, match="got other files in it"):
            get_states(net, [u], path=tmp_path / "other")

    def test_a_failure_leaves_no_half_states(self, tmp_path):
        u = torch.rand(8, 3)
        u[6] = torch.nan
        with pytest.raises(ArgumentError, match="NaN"):
            get_states(Spelled(F.relu, F.relu), u.split(4), path=tmp_path / "s")
        assert not (tmp_path / "s").exists()

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda s: (s / "states.json").unlink(), "got none"),
            (lambda s: (s / "Z.npy").unlink(), "damaged ones"),
            (lambda s: (s / "Z.npy").write_bytes((s / "Z.npy").read_bytes()[:-8]), "damaged ones"),
            (lambda s: np.save(s / "X.npy", np.zeros((2, 2))), r"X.npy of shape \(2, 2\) instead of \(9, 4\)"),
            (lambda s: np.save(s / "X.npy", np.array([{}]), allow_pickle=True), "damaged ones"),
            (lambda s: (s / "states.json").write_text("{}"), "damaged ones"),
            (
                lambda s: (s / "states.json").write_text(
                    json.dumps(json.loads((s / "states.json").read_text()) | {"format": 9})
                ),
                "expected format 1, got 9",
            ),
        ],
    )
    def test_damage_is_worded(self, tmp_path, damage, message):
        get_states(Spelled(F.relu, F.relu), [torch.rand(4, 3)], path=tmp_path / "s")
        damage(tmp_path / "s")
        with pytest.raises(CheckpointError, match=message):
            load_states(tmp_path / "s")

    def test_a_file_is_no_folder_of_states(self, tmp_path):
        np.save(tmp_path / "states.npy", np.array([{}]), allow_pickle=True)
        with pytest.raises(CheckpointError, match=r"expected a folder of states.*got a file"):
            load_states(tmp_path / "states.npy")


def poisoned(index):
    u = torch.rand(6, 3)
    u[index] = torch.nan
    return u


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, u):
        return torch.tanh(self.lin(u)) if u.sum() > 0 else torch.relu(self.lin(u))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_states(nn.Linear(3, 2), [torch.rand(2, 3)]), "a teacher with activations, got none"),
        (lambda: get_states(torch.relu, [torch.rand(2, 3)]), "model to be a Module"),
        (lambda: get_states(Spelled(F.relu, F.relu), []), "a loader with batches, got an empty one"),
        (lambda: get_states(Spelled(F.relu, F.relu), [{"u": 1}]), r"inputs of shape .* got dict"),
        (lambda: get_states(Spelled(F.relu, F.relu), [torch.rand(3)]), r"inputs of shape .* got \(3,\)"),
        (
            lambda: get_states(Spelled(F.relu, F.relu), [poisoned(2)]),
            "NaN or infinite values in 'X'|in '' .relu., in 1",
        ),
        (lambda: get_states(Spelled(F.relu, F.relu), [torch.rand(2, 3)], dtype=torch.float16), "float32 or float64"),
        (
            lambda: get_states(Spelled(F.relu, F.relu), [torch.rand(2, 3)], skip_layers=0),
            "skip_layers to be a positive",
        ),
        (
            lambda: get_states(Spelled(F.relu, F.relu), [torch.rand(2, 3)], skip_layers=1, layers=[0]),
            "layers or skip_layers, got both",
        ),
        (
            lambda: get_states(Spelled(F.relu, nn.ReLU()), [torch.rand(2, 3)], layers=["third"]),
            r"layers among 0: '' \(relu\), 1: 'second' \(relu\), got 'third'",
        ),
        (lambda: get_states(Branching(), [torch.ones(2, 3), -torch.ones(2, 3)]), r"got '' \(relu\) of 3 in batch 2"),
        (
            lambda: get_states(nn.Sequential(nn.Flatten(0), nn.ReLU(), nn.Unflatten(0, (2, 3))), [torch.rand(2, 3)]),
            r"a row per sample in every activation .* got \(6,\) in '1' \(relu\)",
        ),
        (lambda: get_states(nn.Sequential(nn.ReLU(), nn.Flatten(0)), [torch.rand(2, 3)]), "one tensor .* got .6,."),
    ],
)
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_a_nan_inside_names_its_layer():
    class Poison(nn.Module):
        def forward(self, z):
            return z.log()

    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Poison(), nn.Tanh())
    with pytest.raises(ArgumentError, match=r"NaN or infinite values in '3' \(tanh\), in \d samples of batch 1"):
        get_states(net, [torch.randn(5, 3)])


class TestWeights:
    """v against the least fixed point of the matrix, which is written down here."""

    def blocks(self, *rows):
        return torch.cat([torch.cat(row, 1) for row in rows])

    def test_of_a_plain_network(self):
        net = Spelled(F.relu, F.relu)
        with torch.no_grad():
            net.b.weight *= 9.0
        A = self.blocks([torch.zeros(4, 4), net.b.weight], [torch.zeros(5, 4), torch.zeros(5, 5)])
        v = teacher_weights(net, (1, 3), 0.9)
        torch.testing.assert_close(v, perron_weights(A, 0.9))
        assert v.max() > 2

    def test_of_a_residual_network_with_batch_norm(self):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
                self.norm.running_mean.normal_()
                self.norm.running_var.uniform_(0.1, 2.0)
                nn.init.normal_(self.norm.weight)

            def forward(self, u):
                h = F.relu(self.a(u))
                return F.relu(self.norm(self.b(h)) + h)

        net = Residual()
        W = (net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt())[:, None] * net.b.weight
        A = self.blocks([torch.zeros(4, 4), W.abs() + torch.eye(4)], [torch.zeros(4, 8)])
        torch.testing.assert_close(teacher_weights(net, (2, 3), 0.5), perron_weights(A, 0.5))

    def test_of_a_convolutional_network(self):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten())
        identity = torch.eye(2 * 4 * 4).unflatten(1, (2, 4, 4))
        W = (net[2](identity) - net[2].bias[:, None, None]).flatten(1).t()
        A = self.blocks([torch.zeros(48, 48), W], [torch.zeros(32, 80)])
        v, close = teacher_weights(net, (2, 1, 6, 6), 0.5), digits(1e-7, 1e-5)
        torch.testing.assert_close(v, perron_weights(A, 0.5), rtol=close, atol=close)

    def test_of_an_implicit_model(self):
        model = ImplicitModel(3, 2, 5, kappa=0.9)
        torch.testing.assert_close(teacher_weights(model, (1, 3), 0.95), torch.ones(5, dtype=torch.float64))

    def test_where_a_pass_does_not_tell(self):
        assert teacher_weights(nn.Sequential(nn.Linear(2, 3), ImplicitModel(3, 2, 4)), (1, 2), 0.9) is None
        slow = ImplicitModel(3, 2, 4, kappa=0.9)
        with torch.no_grad():
            slow.A.fill_(1.0)
        assert teacher_weights(slow, (1, 3), 0.5) is None

    def test_the_teacher_is_left_as_it_was(self):
        net = Spelled(F.relu, nn.ReLU(inplace=True)).train()
        before = copy.deepcopy(net.state_dict())
        teacher_weights(net, (1, 3), 0.9)
        assert net.training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
