"""Constants have the dtype and the device of their data: nothing depends on what torch's defaults are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import implicitdl
from implicitdl import ImplicitModel, StateSpace, certify, compress
from implicitdl.activations import BUILTIN, LEAKY_RELU, LeakySlope, from_function
from implicitdl.certify import Box, Crown, Interval, Sensitivity
from implicitdl.constraints import Monotone
from implicitdl.statespace import from_module, reduce_on_box

F64 = torch.float64
ROOT = Path(implicitdl.__file__).parent
# What torch makes on its default device, unless it is told where, and, of the second, in its default dtype.
PLACED = {"as_tensor", "asarray", "arange", "randint", "randperm", "sparse_coo_tensor", "sparse_csr_tensor"}
TYPED = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}
# Problems to try a solver on are made where the caller's own tensors are.
PROBLEMS = ROOT / "testing"


def of_torch(function: ast.expr) -> bool:
    while isinstance(function, ast.Attribute):
        function = function.value
        if isinstance(function, ast.Name):
            return function.id == "torch"
    return False


def calls() -> Iterator[tuple[str, str, set[str]]]:
    """Where torch makes a tensor, by which function, and the keywords that it is given."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path.parent != PROBLEMS and isinstance(node, ast.Call) and of_torch(node.func):
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield place, ast.unparse(node.func)[6:], {keyword.arg or "" for keyword in node.keywords}


def test_a_new_tensor_is_told_its_device_and_its_dtype():
    made = list(calls())
    assert made
    untold = [f"{where} {name}" for where, name, told in made if name in PLACED | TYPED and "device" not in told]
    untold += [f"{where} {name}" for where, name, told in made if name in TYPED and "dtype" not in told]
    assert untold == []


def test_slopes_of_leaky_relu_have_the_digits_of_their_input(float32):
    z = torch.tensor([-2.0, 0.0, 3.0], dtype=F64)
    for slope in (LEAKY_RELU.dphi, LeakySlope(0.01)):
        assert slope(z).tolist() == [0.01, 0.01, 1.0]


def test_no_positive_margin_of_a_state_that_is_behind(float32):
    """At u = −3 the state is −0.03 and y₀ = 30 000 − 4e-4 − 30 000 < 0 = y₁."""
    one = torch.ones(1, 1, dtype=F64)
    C, b_y = torch.tensor([[1e6], [0.0]], dtype=F64), torch.tensor([30000 - 4e-4, 0.0], dtype=F64)
    space = StateSpace(0 * one, one, C, b_y=b_y, blocks=LEAKY_RELU)
    found = certify.margins(space, Box(-3 * one, -2 * one), torch.tensor([0]))
    assert not bool(found.certified)
    assert -4.1e-4 < float(found.lower[0, 1]) <= -4e-4


@pytest.mark.parametrize("name", BUILTIN)
def test_bounds_are_the_same_under_every_default_dtype(name):
    g = torch.Generator().manual_seed(0)
    A, B, C = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((5, 5), (5, 3), (2, 5)))
    space = StateSpace(A * 0.8 / A.abs().sum(1, keepdim=True) / BUILTIN[name].lipschitz, B, C, blocks=BUILTIN[name])
    box = Box.around(torch.rand(4, 3, generator=g, dtype=F64), 0.1)
    methods = [Sensitivity()] if BUILTIN[name].slope[0] < 0 else [Sensitivity(), Interval(), Crown(rounds=1)]
    found = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        bounds = [certify.output_bounds(space, box, method) for method in methods]
        lip = torch.tensor([certify.lipschitz_inf(space), certify.lipschitz_two(space)], dtype=F64)
        found.append(torch.cat([lip, *(end.flatten() for y in bounds for end in (y.lower, y.upper))]))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_free_parameters_of_a_monotone_matrix_keep_its_dtype(dtype):
    constraint = Monotone(m=0.2)
    raw = constraint.right_inverse(constraint(torch.randn(4, 4, dtype=dtype)))
    assert raw.dtype == dtype


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """A default device on which no number can be read, as a stand-in for any that is not the data's."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture
def model() -> ImplicitModel:
    return ImplicitModel(4, 3, 8, bias=True)


@pytest.fixture
def u() -> torch.Tensor:
    return torch.rand(5, 4)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(2, 4), nn.Softplus(), nn.Linear(4, 3),
    )  # fmt: skip


class TestElsewhere:
    """The fixture ``elsewhere`` comes last, so that the data are made before."""

    @pytest.mark.parametrize("method", [Sensitivity(), Interval(), Crown(), Crown(steps=2, rounds=1)], ids=str)
    def test_bounds(self, method, model, u, labels, elsewhere):
        found = certify.margins(model, Box.around(u, 0.01), labels, method)
        assert found.lower.device == u.device

    def test_proofs(self, model, elsewhere):
        assert certify.well_posed(model)
        S = certify.sensitivity(model)
        assert certify.lipschitz_inf(model) >= S.sum(1).max()
        assert certify.lipschitz_two(model) <= 1.001 * torch.linalg.matrix_norm(S, 2)
        assert certify.p_matrix(torch.eye(3, device="cpu"))

    def test_accuracy_and_loss(self, model, u, labels, elsewhere):
        assert certify.certified_accuracy(model, [(u, labels)], 0.01, restarts=2).samples == 5
        loss = certify.CertifiedLoss(eps=0.1, ramp=1, clean=(0.5, 0.5), crown=(0.5, 0.5))
        loss(model, u, labels, 1).backward()
        assert model.A.grad.device == u.device

    def test_conversion(self, net, u, elsewhere):
        image = u[:2].unflatten(1, (1, 4)).expand(-1, 4, -1).unsqueeze(1)
        space = from_module(net, image)
        assert torch.allclose(space(image), net(image), rtol=1e-4)
        small = reduce_on_box(space, torch.zeros_like(space.b_x[:1]).expand(16), torch.ones_like(u[0, 0]).expand(16))
        assert small.n <= space.n

    def test_compression(self, model, u, elsewhere):
        stacked = compress(nn.Sequential(model, nn.Softplus()))
        assert torch.allclose(stacked(u), nn.functional.softplus(model(u)), rtol=1e-4)

    def test_solves_of_an_rnn_with_low_rank(self, u, elsewhere):
        options = {"is_low_rank": True, "rank": 2, "device": "cpu"}
        rnn = implicitdl.ImplicitRNN(input_dim=2, output_dim=2, hidden_dim=4, implicit_hidden_dim=5, **options)
        assert rnn(u.unflatten(1, (2, 2))).device == u.device

    def test_the_slope_of_an_unknown_activation(self, elsewhere):
        with pytest.warns(implicitdl.ImplicitFunctionWarning, match="slope of φ is not known"):
            assert from_function(lambda z: torch.sin(z) / 2).slope == pytest.approx((-0.5, 0.5))
