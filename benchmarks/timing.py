"""Alternating timings, medians over rounds: every side once per round, each first in turn, so that drift and order hit
all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def alternate(
    sides: dict[str, Callable[[], object]], *, rounds: int, repeats: int = 1, warm_up: int = 2
) -> dict[str, float]:
    """Median seconds per call of each side."""
    for _ in range(warm_up):
        for side in sides.values():
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for first in range(rounds):
        # The first of a round brings the data into the cache for the others: each is it in turn.
        for name in names[first % len(names) :] + names[: first % len(names)]:
            side = sides[name]
            start = time.perf_counter()
            for _ in range(repeats):
                side()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def header(*columns: str) -> None:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
