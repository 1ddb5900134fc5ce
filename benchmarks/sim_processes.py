"""State matching in one and in two processes of one thread each: the same A, B, C, D, in how much of the time.

Both are started by torchrun on the same stored states, those of the tutorial's problem, in turn, so that drift of the
machine hits both alike.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sim import KAPPA, LAMBDA, tutorial_states
from sim_accuracy import SAMPLES
from timing import header
from torch import Tensor

from implicitdl.sim import load_states
from implicitdl.sim.solvers import ADMMMultiGPUSolver

STATES, FOUND = "states", "found{}.safetensors"


def run(samples: int = SAMPLES, epochs: int = 5, launches: int = 3, rounds: int = 3) -> None:
    found: dict[int, list[dict[str, Tensor]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tutorial_states(samples, epochs, folder / STATES)
        for _ in range(launches):
            for processes, results in found.items():
                results.append(_launched(processes, folder, rounds))
    seconds = {
        processes: statistics.median(torch.cat([one["seconds"] for one in results]).tolist())
        for processes, results in found.items()
    }
    print(f"\nState matching in processes of one thread, {samples:,} samples")
    header("processes", "s", "÷ one", "wanted", "largest difference of A, B, C, D", "wanted", "rows converged")
    for processes, wanted in ((1, ("", "")), (2, ("≤ 0.6", "≤ 1e-10"))):
        share = seconds[processes] / seconds[1]
        results = found[processes]
        off = max(float((one[part] - found[1][0][part]).abs().max()) for one in results for part in "ABCD")
        rows = results[0]["converged"]
        print(
            f"| {processes} | {seconds[processes]:.2f} | {share:.2f} | {wanted[0]} | {off:.1e} | {wanted[1]} "
            f"| {int(rows.sum())} of {len(rows)} |", flush=True,
        )  # fmt: skip


def _launched(processes: int, folder: Path, rounds: int) -> dict[str, Tensor]:
    """What the first of so many processes has found, and its seconds of every round."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run(
        [*torchrun, __file__, str(folder), str(rounds)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return load_file(folder / FOUND.format(processes))


def _worker(folder: Path, rounds: int) -> None:
    states = load_states(folder / STATES)
    X, U, Z, Y = (states[name].clone() for name in "XUZY")
    solver = ADMMMultiGPUSolver(lambda_z=LAMBDA, lambda_y=LAMBDA, gpu_ids=())
    seconds = []
    for _ in range(1 + rounds):  # the first warms up, and joins the processes
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        found = solver.fit(X, U, Z, Y, {"kappa": KAPPA})
        seconds.append(time.perf_counter() - start)
    if int(os.environ["RANK"]) == 0:
        parts = dict(zip("ABCD", (part.contiguous() for part in found), strict=True))
        parts["seconds"] = torch.tensor(seconds[1:], dtype=torch.float64)
        parts["converged"] = torch.cat([found.hidden.converged, found.output.converged])
        save_file(parts, folder / FOUND.format(os.environ["WORLD_SIZE"]))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _worker(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        run()
