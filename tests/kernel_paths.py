"""With and without the compiled loops, in one thread and in several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from implicitdl.kernels import anderson, loops


@contextmanager
def torch_alone() -> Iterator[None]:
    """As on a machine without a compiler."""
    with mock.patch.object(loops, "loops", return_value=None), mock.patch.object(anderson, "loops", return_value=None):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        # From the first multiplication on.
        with mock.patch.object(loops, "_WORTH_A_THREAD", 1):
            yield
    finally:
        torch.set_num_threads(before)
