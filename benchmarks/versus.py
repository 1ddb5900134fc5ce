"""This checkout against another: `python benchmarks/versus.py PATH` times both, alternating, in one run.

PATH is a work tree of the same repository, for instance of `git worktree add ../before REVISION`.  One process per
checkout stays alive; each round asks first one and then the other, in turn, for the median seconds of a few calls.  The
ratio is the median over rounds of the ratios within a round, and its quartiles tell how much the machine drifts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Calls in a round, and rounds.
TASKS = {
    "step-100": (10, 200),
    "step-300": (4, 60),
    "step-1000": (2, 25),
    "tanh-100": (10, 100),
    "silu-100": (10, 100),
    "gelu-100": (10, 100),
    "conv": (1, 15),
    "sim": (1, 5),
}


def training_step(n: int, batch: int, activation: str = "relu") -> Callable[[], object]:
    """Forward, backward and Adam, on Fashion-MNIST, from weights that ReLU was trained to in 200 steps."""
    from fashion import images, stepper, trained

    from implicitdl import ImplicitModel
    from implicitdl.activations import BUILTIN

    u, y = images()
    phi = BUILTIN[activation]
    model = ImplicitModel(784, 10, n, activation=phi, tol=1e-5, grad_tol=1e-5)
    model.load_state_dict(trained(n, u, y, steps=200))
    return stepper(model, u, y, batch)


def conv() -> Callable[[], object]:
    """Forward and backward of the residual block of `conv_block.py`, with the default solver."""
    import torch

    from implicitdl import Auto, ImplicitAdjoint, fixed_point
    from implicitdl.nn import ResidualBlock

    torch.manual_seed(0)
    f, u = ResidualBlock(48, 64), torch.randn(16, 48, 32, 32, requires_grad=True)
    solver = Auto(rtol=1e-3)

    def step() -> None:
        value = fixed_point(f, torch.zeros_like(u), u, solver=solver, adjoint=ImplicitAdjoint(solver=solver)).value
        value.square().mean().backward()  # type: ignore[union-attr]

    return step


def sim() -> Callable[[], object]:
    """All rows of the tutorial's problem."""
    import torch
    from fashion import images, tutorial_teacher

    from implicitdl.sim import get_states
    from implicitdl.sim.solvers import ADMMSolver

    u, y = images()
    order = torch.randperm(len(u), generator=torch.Generator().manual_seed(0))
    states = get_states(tutorial_teacher(u, y, 1), [u[order[:2000]]])
    X, U, Z, Y = (states[name] for name in "XUZY")
    return lambda: ADMMSolver(lambda_z=1e-6, lambda_y=1e-6).fit(X, U, Z, Y, {"kappa": 0.99})


def task(name: str) -> Callable[[], object]:
    if name.startswith("step-"):
        n = int(name.removeprefix("step-"))
        return training_step(n, {100: 64, 300: 100, 1000: 256}[n])
    if name.endswith("-100"):
        return training_step(100, 64, name.removesuffix("-100"))
    return {"conv": conv, "sim": sim}[name]()


def worker(name: str) -> None:
    """A line in, the number of calls; a line out, the median seconds of one."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    call = task(name)
    for _ in range(3):
        call()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds), flush=True)


def start(checkout: Path, name: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout / "src"), str(HERE)])}
    command = [sys.executable, __file__, "--worker", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ask(process: subprocess.Popen[str], calls: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    print(calls, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def run(other: Path, names: list[str]) -> None:
    print("| task | this ms | other ms | this ÷ other, median | quartiles | rounds |\n|---|---|---|---|---|---|")
    for name in names:
        calls, rounds = TASKS[name]
        sides = [start(HERE.parent, name), start(other.resolve(), name)]
        times: list[tuple[float, float]] = []
        for i in range(rounds):
            first = ask(sides[i % 2], calls)
            second = ask(sides[1 - i % 2], calls)
            times.append((first, second) if i % 2 == 0 else (second, first))
        for side in sides:
            side.communicate()
        low, middle, high = statistics.quantiles([ours / theirs for ours, theirs in times], n=4)
        this, before = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
        print(f"| {name} | {this:.3f} | {before:.3f} | {middle:.3f} | {low:.3f}–{high:.3f} | {rounds} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        worker(sys.argv[2])
    else:
        run(Path(sys.argv[1]), sys.argv[2:] or list(TASKS))
