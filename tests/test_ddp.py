"""DistributedDataParallel around one and several solves a step: the gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from implicitdl import DEQ, Anderson, ImplicitAdjoint, ImplicitModel, ImplicitRNN
from two_processes import joined

PROCESSES = 2


class Several(nn.Module):
    """One layer solved twice, a DEQ with dropout-free weights of its own, and a solve for every step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ImplicitModel(4, 4, 6, bias=True)
        self.block = nn.Linear(8, 4)
        self.deq = DEQ(self._block, solver=Anderson())
        self.recurrent = ImplicitRNN(input_dim=2, output_dim=3, hidden_dim=3, implicit_hidden_dim=4)

    def _block(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.block(torch.cat((0.5 * x, u), dim=1)))

    def forward(self, u: Tensor) -> Tensor:
        x = self.deq(self.inner(u) + self.inner(0.1 * u))
        return self.recurrent(x.unflatten(1, (2, 2)))


MODELS = {
    "one solve": lambda: ImplicitModel(4, 3, 6, bias=True),
    "low rank, order 2": lambda: ImplicitModel(4, 3, 6, is_low_rank=True, rank=2, adjoint=ImplicitAdjoint(order=2)),
    "several solves": Several,
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The same everywhere; the samples of the second half take more steps than those of the first."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    u = torch.randn(8, 4) * torch.linspace(0.1, 10.0, 8).unsqueeze(1)
    return MODELS[name](), u, torch.randn(8, 3)


def train(model: nn.Module, u: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Weights after three steps, and the gradients of the last."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.mse_loss(model(u), target).backward()
        optimiser.step()
    weights = dict(model.named_parameters())
    return {name: w.detach() for name, w in weights.items()} | {f"{name}.grad": w.grad for name, w in weights.items()}


def worker(folder: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for name in MODELS:
        model, u, target = problem(name)
        found = train(DistributedDataParallel(model), u.chunk(PROCESSES)[rank], target.chunk(PROCESSES)[rank])
        torch.save({key.removeprefix("module."): value for key, value in found.items()}, f"{folder}/{name}.{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    joined("import sys\nfrom test_ddp import worker\nwork = lambda: worker(sys.argv[2])\n", str(folder))
    return folder


@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one_with_the_whole_batch(name, folder):
    alone = train(*problem(name))
    for rank in range(PROCESSES):
        found = torch.load(folder / f"{name}.{rank}")
        assert found.keys() == alone.keys()
        for key in alone:
            assert torch.allclose(found[key], alone[key], rtol=1e-7, atol=1e-9), key
    # The comparison could fail: half of the batch alone gives other gradients.
    model, u, target = problem(name)
    half = train(model, u[:4], target[:4])
    assert any(not torch.allclose(half[key], alone[key], rtol=1e-3) for key in alone)
