"""What all tests share: float64 by default, a fixed seed, and the same examples of hypothesis in every run.

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

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("search", max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


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
