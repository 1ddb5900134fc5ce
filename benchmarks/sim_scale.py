"""State matching at scale: peak memory and time of the default solver, which grow with (n + p)² and not with samples.

The states are those of a planted sparse model of four layers on random inputs, in float32, with noise of a hundredth
added to Z and Y.  Each size is solved in a process of its own, whose peak counts all: Python
with PyTorch, the states, and what the solver needs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings
from itertools import product

import resident
import torch
from timing import header
from torch import Tensor

from implicitdl.sim import SIMWarning
from implicitdl.sim.solvers import ADMMSolver

SIZES = ((500, 768, 5_000), (1_000, 1_536, 10_000), (2_000, 3_072, 20_000))
LAYERS, OUTPUTS = 4, 10
# Nonzeros of a planted row of A and of B, whose sums of absolute values are at most 0.9 and 1.
INSIDE, FROM_INPUT = 10, 20
NOISE = 0.01
# λ beside the default: so many standard deviations of a feature's correlation with the noise, above which the rows are
# about as sparse as those planted.
DEVIATIONS = 5


def planted(n: int, p: int, samples: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, U, Z, Y of n states in layers, the last first: each sees the inputs, and the layer that comes before it."""
    g = torch.Generator().manual_seed(seed)
    U = torch.randn(p, samples, generator=g)
    size = n // LAYERS
    X, Z = torch.empty(n, samples), torch.empty(n, samples)
    for layer in reversed(range(LAYERS)):
        rows = slice(layer * size, (layer + 1) * size)
        Z[rows] = _sparse(size, p, FROM_INPUT, 1.0, g) @ U
        if layer < LAYERS - 1:
            Z[rows] += _sparse(size, size, INSIDE, 0.9, g) @ X[rows.stop : rows.stop + size]
        X[rows] = Z[rows].relu()
    Y = _sparse(OUTPUTS, n, INSIDE, 1.0, g) @ X
    return (
        X,
        U,
        Z + NOISE * torch.randn(n, samples, generator=g),
        Y + NOISE * torch.randn(OUTPUTS, samples, generator=g),
    )


def _sparse(rows: int, columns: int, nonzeros: int, size: float, g: torch.Generator) -> Tensor:
    """Rows of so many weights at random places, whose absolute values add up to size."""
    weights = torch.randn(rows, nonzeros, generator=g)
    weights *= size / weights.abs().sum(dim=1, keepdim=True)
    at = torch.rand(rows, columns, generator=g).topk(nonzeros, dim=1).indices
    return torch.zeros(rows, columns).scatter(1, at, weights)


def run(sizes: tuple[tuple[int, int, int], ...] = SIZES) -> None:
    print(f"\nState matching at scale, planted states, {torch.get_num_threads()} threads")
    header("n", "p", "samples", "λ", "states MiB", "before MiB", "peak MiB", "(n + p)² in float64, MiB", "s",
           "worst relative gap", "wanted", "rows converged", "‖A‖∞", "nonzeros per row")  # fmt: skip
    for (n, p, samples), default in product(sizes, (True, False)):
        lam = ADMMSolver().lambda_z if default else DEVIATIONS * NOISE * math.sqrt(samples)
        settings = [str(number) for number in (n, p, samples, lam, torch.get_num_threads())]
        task = [sys.executable, __file__, *settings]
        f = json.loads(subprocess.run(task, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(
            f"| {n:,} | {p:,} | {samples:,} | {lam:.3g} | {f['states']:.0f} | {f['before']:.0f} | {f['peak']:.0f} "
            f"| {8 * (n + p) ** 2 / 2**20:.0f} | {f['seconds']:.1f} | {f['gap']:.1e} | ≤ 1e-6 "
            f"| {f['converged']} of {n + OUTPUTS} | {f['norm']:.6f} | {f['support']:.1f} |", flush=True,
        )  # fmt: skip


def _alone(n: int, p: int, samples: int, lam: float) -> dict[str, float]:
    states = planted(n, p, samples)
    before = resident.now()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SIMWarning)  # the table says it
        found = ADMMSolver(lambda_z=lam, lambda_y=lam).fit(*states)
    seconds = time.perf_counter() - start
    parts = (found.hidden, found.output)
    return {
        "states": sum(part.nbytes for part in states) / 2**20,
        "before": before,
        "peak": resident.peak(),
        "seconds": seconds,
        "gap": max(float(part.relative_gap.max()) for part in parts),
        "converged": sum(int(part.converged.sum()) for part in parts),
        "norm": float(found.hidden.norm.max()),
        "support": float(found.hidden.support.double().mean()),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        n, p, samples, lam, threads = sys.argv[1:]
        torch.set_num_threads(int(threads))
        print(json.dumps(_alone(int(n), int(p), int(samples), float(lam))))
    else:
        torch.set_num_threads(2)
        run()
