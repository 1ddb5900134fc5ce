"""The examples of the docstrings draw the same numbers in every run; it lies outside the package and is not installed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
