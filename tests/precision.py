"""The tolerance of a test in the dtype that its numbers are drawn in by default."""

from __future__ import annotations

import torch


def digits(double: float, single: float) -> float:
    """The first where torch's default is float64, the second where it is float32; see --default-dtype."""
    return {torch.float64: double, torch.float32: single}[torch.get_default_dtype()]
