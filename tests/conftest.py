"""What all tests share: float64 by default, a fixed seed, and the same examples of hypothesis in every run.

``--default-dtype float32`` keeps torch's own default, so that a constant of another dtype than its data shows; what is
marked `float64` asks for more digits of numbers that it draws by default, and keeps that default.

``HYPOTHESIS_PROFILE=search`` looks for new ones; what it finds becomes an ``@example``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from standins import FOLDERS, write_cifar, write_mnist

hypothesis.settings.register_profile("same", max_examples=20, derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--default-dtype", choices=["float64", "float32"], default="float64")


@pytest.fixture(autouse=True)
def _default_dtype_and_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    keeps = request.node.get_closest_marker("float64")
    name = "float64" if keeps else request.config.getoption("--default-dtype")
    torch.set_default_dtype(getattr(torch, name))
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _compiled_code_is_reached(request: pytest.FixtureRequest) -> None:
    """A mode of dispatch, such as that of other_blas, sees the operations of torch only: others are switched off."""
    if request.node.get_closest_marker("compiled") and torch._C._len_torch_dispatch_stack():
        pytest.skip("a mode of dispatch switches compiled code off")


@pytest.fixture
def float32() -> None:
    """For the seeds, whose numbers were printed in torch's own default; the fixture above puts it back."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny MNIST, Fashion-MNIST and CIFAR-10 in torchvision's layout."""
    write_mnist(tmp_path / FOLDERS["mnist"])
    write_mnist(tmp_path / FOLDERS["fashion-mnist"])
    write_cifar(tmp_path / FOLDERS["cifar10"], monkeypatch)
    return tmp_path
