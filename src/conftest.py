"""The examples of docstrings draw the same numbers in every run.  Outside the package, and not installed with it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
