"""What all tests share: float64 by default and a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def float32() -> Iterator[None]:
    """For the seeds, whose numbers were printed in torch's own default."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    yield
