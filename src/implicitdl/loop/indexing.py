"""Rows of tensors by what is kept of them on the host, in numpy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(figures: np.ndarray, like: Tensor) -> Tensor:
    """On the device of ``like``; on the CPU without a copy."""
    tensor = torch.from_numpy(figures)
    return tensor if like.device.type == "cpu" else tensor.to(like.device)


def on_host(tensor: Tensor) -> np.ndarray:
    """One figure a row, in double precision."""
    figures: np.ndarray = tensor.double().cpu().numpy()
    return figures.reshape(-1)


def select(x: Tensor, which: np.ndarray) -> Tensor:
    """The rows that a mask marks."""
    return x.index_select(0, on_device(which.nonzero()[0], x))


def put(base: Tensor, rows: np.ndarray, values: Tensor) -> Tensor:
    """``base`` with some rows, by mask or by number, replaced; a new tensor, since graphs may share the old one."""
    numbers = rows.nonzero()[0] if rows.dtype == bool else rows
    return base.index_put((on_device(numbers, base),), values)
