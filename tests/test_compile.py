"""torch.compile around a model with a solve in it: the same numbers, and nothing compiled again from step to step."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from implicitdl import (
    DEQ,
    ImplicitFunctionTriu,
    ImplicitFunctionWarning,
    ImplicitModel,
    ImplicitRNN,
    Monitor,
    Picard,
    fixed_point,
)
from implicitdl.constraints import RowProjection
from precision import digits

pytestmark = [
    pytest.mark.compiled,
    # Both are torch's own: the first on its way to trace a Function, the second wherever a graph ends in a tensor
    # that has a graph of autograd's.
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


class Around(nn.Module):
    """Ordinary layers before and after one that solves."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(6, 4), layer, nn.Linear(4, 2)

    def forward(self, u: Tensor) -> Tensor:
        return self.after(torch.relu(self.layer(torch.tanh(self.before(u)))))


class Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, u: Tensor) -> Tensor:
        return fixed_point(lambda x, u: torch.tanh(0.5 * self.inner(x) + u), torch.zeros_like(u), u).value


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = ImplicitRNN(input_dim=2, output_dim=4, hidden_dim=3, implicit_hidden_dim=4)

    def forward(self, u: Tensor) -> Tensor:
        return self.rnn(u.unflatten(1, (2, 2)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.inner(x) + u)


LAYERS = {
    "RowScaling": lambda: ImplicitModel(4, 4, 6, bias=True),
    "RowProjection": lambda: ImplicitModel(4, 4, 6, constraint=RowProjection),
    "triangular": lambda: ImplicitModel(4, 4, 6, f=ImplicitFunctionTriu),
    "low rank": lambda: ImplicitModel(4, 4, 6, is_low_rank=True, rank=2),
    "closure": Closure,
    "DEQ": lambda: DEQ(Block()),
    "sequence": Sequence,
}


@pytest.fixture(autouse=True)
def _no_graphs_left() -> None:
    torch._dynamo.reset()
    counters.clear()


def compiled_and_eager(layer, backend):
    model, eager = Around(layer()), Around(layer())
    with torch.no_grad():
        for weight in model.layer.parameters():
            weight.mul_(5.0)
    eager.load_state_dict(model.state_dict())
    return model, torch.compile(model, backend=backend), eager


def steps(model, run, count=4):
    """SGD on batches from easy to hard; what comes out, the last gradients, and the frames compiled so far."""
    torch.manual_seed(1)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    frames = []
    for k in range(count):
        optimiser.zero_grad()
        y = run(10.0**k / 10 * torch.randn(5, 6))
        y.pow(2).mean().backward()
        optimiser.step()
        frames.append(counters["frames"]["total"])
    return y.detach(), [weight.grad for weight in model.parameters()], frames


# The second backend traces the backward pass too.
RUNS = [(name, "aot_eager" if name in ("RowScaling", "closure") else "eager") for name in LAYERS]


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_compiled_once_and_with_the_same_numbers(name, backend):
    model, compiled, eager = compiled_and_eager(LAYERS[name], backend)
    y, gradients, frames = steps(model, compiled)
    assert frames[0] > 0
    assert counters["stats"]["unique_graphs"] >= 1  # the layers around the solve are in graphs
    # The second step may meet what the first has set up; from then on nothing is compiled, and a longer solve is none.
    assert frames[1:] == [frames[1]] * 3
    assert frames[1] - frames[0] <= 1
    expected_y, expected, _ = steps(eager, eager)
    assert torch.allclose(y, expected_y, rtol=digits(1e-8, 1e-5), atol=digits(1e-10, 1e-6))
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other, rtol=digits(1e-7, 1e-5), atol=digits(1e-10, 1e-6))


def test_the_solver_itself_is_never_traced():
    model, compiled, _ = compiled_and_eager(LAYERS["RowScaling"], "eager")
    steps(model, compiled)
    reasons = "\n".join(counters["graph_break"])
    assert "fixed_point" in reasons
    assert len(counters["graph_break"]) == 1
    assert "iterate" not in reasons


def test_monitors_and_warnings_work_as_ever():
    model = Around(ImplicitModel(4, 4, 6, solver=Picard(max_steps=1)))
    compiled = torch.compile(model, backend="eager")
    with Monitor() as monitor, pytest.warns(ImplicitFunctionWarning, match=r"fixed_point\(Picard\): 5 of 5 samples"):
        compiled(torch.randn(5, 6)).sum().backward()
    assert monitor.samples == 5
    assert len(monitor.backward) == 1


def test_another_batch_size_is_right():
    _, compiled, eager = compiled_and_eager(LAYERS["RowScaling"], "eager")
    for batch in (5, 3, 1):
        u = torch.randn(batch, 6)
        assert torch.allclose(compiled(u), eager(u), rtol=1e-9)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.vmap(lambda u: f(u.unsqueeze(0))),
        lambda f: lambda u: torch.func.jvp(f, (u,), (u,)),
    ],
    ids=["vmap", "jvp"],
)
def test_a_transform_inside_a_compiled_function(transform):
    run, u = transform(ImplicitModel(4, 2, 6)), torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(run, backend="eager")(u), run(u))


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a compiler")
def test_inductor():
    model, compiled, eager = compiled_and_eager(LAYERS["RowScaling"], "inductor")
    y, gradients, frames = steps(model, compiled)
    expected_y, expected, _ = steps(eager, eager)
    assert frames[1:] == [frames[1]] * 3
    assert torch.allclose(y, expected_y, rtol=1e-7)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-9)
