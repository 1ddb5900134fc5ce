"""Memory that a process holds.

Linux alone says it of a program by itself: the maximum of `resource.getrusage` includes the process that it was forked
from.
"""

from __future__ import annotations

import ctypes
import gc
import math
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def now() -> float:
    """MiB; NaN where the system does not tell."""
    return _line("VmRSS")


def peak() -> float:
    """MiB at most, since the program began or since `forget_peak`."""
    return _line("VmHWM")


def forget_peak() -> None:
    """Give back what is free, and begin anew with what is held."""
    gc.collect()
    if RESET.exists():
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")


def _line(name: str) -> float:
    if not STATUS.exists():
        return math.nan
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
