"""The tutorial's residual block (48/64 channels, 32×32, batch 16, float32), solved and differentiated: both libraries.

Overhead is what a forward solve takes outside f, both timed inside the same call.  torchdeq stops when the worst
sample of the batch reaches the relative tolerance; ours when each sample does.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import resident
import torch
from timing import alternate, header
from torch import Tensor, nn
from torchdeq import get_deq

from implicitdl import Anderson, Auto, ImplicitAdjoint, Picard, Solver, fixed_point
from implicitdl.nn import ResidualBlock

CHANNELS, INNER, SIZE, BATCH, RTOL = 48, 64, 32, 16, 1e-3
# What each side calls its methods; the memory of 6 iterates is torchdeq's default, 5 differences are 6 iterates.
SIDES: dict[str, tuple[Solver | None, str]] = {
    "ours, Anderson": (Anderson(rtol=RTOL), ""),
    "torchdeq, anderson": (None, "anderson"),
    "ours, Auto": (Auto(rtol=RTOL), ""),
    "ours, Picard": (Picard(rtol=RTOL), ""),
    "torchdeq, broyden": (None, "broyden"),
    "torchdeq, fixed_point_iter": (None, "fixed_point_iter"),
}


class Counted(nn.Module):
    """f with its evaluations, its products with the Jacobian and the time of the evaluations without grad."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.clear()

    def clear(self) -> None:
        self.evaluations, self.products, self.seconds, self.samples = 0, 0, 0.0, 0

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        start = time.perf_counter()
        y: Tensor = self.f(x, u)
        self.seconds += time.perf_counter() - start
        self.evaluations += 1
        self.samples += len(x)
        if y.requires_grad:
            y.register_hook(self._count)
        return y

    def _count(self, g: Tensor) -> None:
        self.products += 1


def problem() -> tuple[Counted, Tensor]:
    torch.manual_seed(0)
    return Counted(ResidualBlock(CHANNELS, INNER)), torch.randn(BATCH, CHANNELS, SIZE, SIZE)


def side(name: str, f: Counted) -> Callable[[Tensor], Tensor]:
    """u to x*, with an exact gradient."""
    solver, theirs = SIDES[name]
    if solver is not None:
        adjoint = ImplicitAdjoint(solver=solver)
        return lambda u: fixed_point(f, torch.zeros_like(u), u, solver=solver, adjoint=adjoint).value  # type: ignore[return-value]
    deq = get_deq(
        f_solver=theirs, b_solver=theirs, ift=True, f_tol=RTOL, b_tol=RTOL, f_stop_mode="rel", b_stop_mode="rel",
        f_max_iter=100, b_max_iter=100,
    )  # fmt: skip
    return lambda u: deq(lambda x: f(x, u), torch.zeros_like(u))[0][-1]


def step(solve: Callable[[Tensor], Tensor], u: Tensor) -> None:
    u = u.detach().requires_grad_()
    solve(u).square().mean().backward()


def worst_residual(f: Counted, x: Tensor, u: Tensor) -> float:
    with torch.no_grad():
        fx = f.f(x, u)
        return float(((fx - x).flatten(1).norm(dim=1) / fx.flatten(1).norm(dim=1)).max())


def peak_memory(name: str) -> float:
    """MiB that one training step adds, at its peak, to a process that has made one; NaN where only Linux tells."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _one_step(name: str) -> None:
    f, u = problem()
    solve = side(name, f)
    step(solve, u)  # what the first convolution allocates for good is nobody's solver
    resident.forget_peak()
    before = resident.now()
    step(solve, u)
    print(resident.peak() - before)


def run(rounds: int = 7) -> None:
    print(f"\nResidual block {CHANNELS}/{INNER}, {SIZE}×{SIZE}, batch {BATCH}, relative tolerance {RTOL:.0e}")
    f, u = problem()
    solves = {name: side(name, f) for name in SIDES}
    outside: dict[str, list[float]] = {name: [] for name in SIDES}

    def forward(name: str) -> None:
        f.clear()
        start = time.perf_counter()
        with torch.no_grad():
            solves[name](u)
        outside[name].append(time.perf_counter() - start - f.seconds)

    whole = alternate({name: lambda s=s: step(s, u) for name, s in solves.items()}, rounds=rounds, warm_up=1)
    solved = alternate({name: lambda name=name: forward(name) for name in SIDES}, rounds=rounds, warm_up=1)
    header("side", "f evaluations", "products", "forward ms", "of it outside f", "forward + backward ms", "peak MiB",
           "worst residual")  # fmt: skip
    for name, solve in solves.items():
        f.clear()
        step(solve, u)
        evaluations, products = f.evaluations, f.products
        with torch.no_grad():
            residual = worst_residual(f, solve(u), u)
        print(
            f"| {name} | {evaluations} | {products} | {solved[name] * 1e3:.0f} "
            f"| {sorted(outside[name])[len(outside[name]) // 2] * 1e3:.1f} | {whole[name] * 1e3:.0f} "
            f"| {peak_memory(name):.0f} | {residual:.1e} |",
            flush=True,
        )
    _mixed()


def _mixed() -> None:
    """Fifteen samples that start at their solution beside one that starts at zero."""
    f, u = problem()
    solver = Anderson(rtol=RTOL)
    with torch.no_grad():
        start = fixed_point(f, torch.zeros_like(u), u, solver=Anderson(rtol=RTOL / 10)).value
        assert isinstance(start, Tensor)
        start[0] = 0
        f.clear()
        solution = fixed_point(f, start, u, solver=solver)
    print(
        f"mixed batch: {int(solution.steps.sum())} sample evaluations were needed, {f.samples} were made; "
        f"lock step would make {int(solution.steps.max()) * BATCH}"
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    if len(sys.argv) > 1:
        _one_step(sys.argv[1])
    else:
        run()
