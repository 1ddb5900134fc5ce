"""A converted CNN beside the module itself: time of the conversion, memory, and time of an evaluation.

    python benchmarks/conversion.py [side] [batch]

The network is torchvision's resnet18 in float64, with random weights, on images of this side.
"""

from __future__ import annotations

import sys
import time

import torch
from timing import alternate, header, machine

from implicitdl.data import import_torchvision
from implicitdl.statespace import from_module


def run(side: int = 32, batch: int = 16) -> None:
    import_torchvision()
    from torchvision.models import resnet18

    print(f"\nConversion of resnet18 at {side} × {side}, float64, batch {batch}")
    header("states", "nonzeros", "matrices MiB", "conversion s", "module ms", "converted ms", "converted ÷ module",
           "largest difference", "wanted")  # fmt: skip
    torch.manual_seed(0)
    net, u = resnet18().double().eval(), torch.randn(batch, 3, side, side, dtype=torch.float64)
    start = time.perf_counter()
    space = from_module(net, u[:1])
    seconds = time.perf_counter() - start
    # A sparse entry is a row, a column and a value, of 8 bytes each.
    entries = sum(M.values().numel() for M in space.matrices)
    t = alternate({"module": lambda: net(u), "converted": lambda: space(u)}, rounds=5)
    gap = (space(u) - net(u)).abs().max()
    print(
        f"| {space.n:,} | {entries:,} | {24 * entries / 2**20:.0f} | {seconds:.1f} | {t['module'] * 1e3:.0f} "
        f"| {t['converted'] * 1e3:.0f} | {t['converted'] / t['module']:.1f} | {gap:.0e} | ≤ 1e-09 |",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    print(machine())
    run(*map(int, sys.argv[1:]))
