"""State matching: ours, CVXPY with Clarabel and torchidl's ADMM on the tutorial's problem, without rescaling.

Every side gets the same float32 states of the tutorial's teacher and λ = 1e-6, κ = 0.99.  Ours and torchidl's solve
all rows.  Clarabel solves ten of them: its seconds in the first table are those of all rows at the ten rows' mean, its
objective is that of the ten, and the second table compares them.  Objectives are computed from the data in float64,
whoever solved.  A gap is measured to the lower bound that our certificate proves for the row, and is relative to the
objective; where ‖A‖∞ > κ the point is not feasible, and its gap says only how far the objective is from the optimum.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fashion import images, tutorial_teacher
from sim_accuracy import SAMPLES
from timing import alternate, header
from torch import Tensor

from implicitdl.sim import States, get_states
from implicitdl.sim.problem import RowProblem
from implicitdl.sim.solvers import ADMMSolver, CVXSolver

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its docstrings, and what its own imports deprecate
    from torchidl.sim.solvers import ADMMSolver as TorchidlSolver

KAPPA, LAMBDA = 0.99, 1e-6
# Of the stacked rows, last layer first, and of the outputs: about the share that each has of all.
HIDDEN, OUTPUT = (0, 8, 24, 40, 52, 64, 76, 88, 100), (4,)
# Clarabel stops at 1e-8 times the larger of 1 and the objective, and some objectives are 1e-6; there, entries of 1e-7
# matter too.
EXACT: dict[str, Any] = {
    "options": {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-10, "tol_feas": 1e-11},
    "zero": 0.0,
}


def tutorial_states(samples: int = SAMPLES, epochs: int = 5, folder: Path | None = None) -> States:
    """Of the tutorial's teacher on random training images; stored in a new folder where one is given."""
    u, y = images()
    order = torch.randperm(len(u), generator=torch.Generator().manual_seed(0))
    return get_states(tutorial_teacher(u, y, epochs), [u[order[:samples]]], path=folder)


@dataclass
class Half:
    """The rows of (A, B), or those of (C, D), and what our certificate says of the least objective of each."""

    problem: RowProblem
    objective: Tensor
    bound: Tensor

    def objectives(self, w: Tensor, rows: Tensor) -> Tensor:
        problem = self.problem[rows]
        return problem.objective(w, problem.residual(w).square)

    def gap(self, objective: Tensor, rows: Tensor) -> float:
        """The worst."""
        return float(((objective - self.bound[rows]) / objective).max())


def run(samples: int = SAMPLES, epochs: int = 5, rounds: int = 5, theirs: int = 1000) -> None:
    """`theirs`: torchidl's steps for (A, B), 1,000 by default."""
    states = tutorial_states(samples, epochs)
    X, U, Z, Y = (states[name] for name in "XUZY")
    solver, config = ADMMSolver(lambda_z=LAMBDA, lambda_y=LAMBDA), {"kappa": KAPPA}
    found = solver.fit(X, U, Z, Y, config)
    seconds = alternate({"ours": lambda: solver.fit(X, U, Z, Y, config)}, rounds=rounds, warm_up=1)["ours"]
    hidden = RowProblem(X=X, U=U, T=Z, lam=LAMBDA, kappa=KAPPA)
    halves = [
        Half(problem, report.objective, report.objective - report.gap)
        for problem, report in ((hidden, found.hidden), (hidden.replace(T=Y, kappa=math.inf), found.output))
    ]
    count = len(Z) + len(Y)
    print(f"\nState matching on the tutorial's problem, {samples:,} samples, {count} rows, κ = {KAPPA}, λ = {LAMBDA:g}")
    header("solver", "s", "÷ ours", "wanted", "objective", "worst relative gap", "‖A‖∞")

    def row(name: str, time_: float, wanted: str, objective: Tensor | float, gap: float, norm: float) -> None:
        shown = f"| {name} | {time_:.2f} | {time_ / seconds:.1f} | {wanted}"
        print(f"{shown} | {float(objective):.2f} | {gap:.1e} | {norm:.9f} |", flush=True)

    def whole(name: str, time_: float, wanted: str, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> None:
        objectives, gaps = [], []
        for half, w in zip(halves, (torch.cat([A, B], dim=1), torch.cat([C, D], dim=1)), strict=True):
            every = torch.arange(len(w))
            objectives.append(half.objectives(w.double(), every))
            gaps.append(half.gap(objectives[-1], every))
        norm = float(A.double().abs().sum(dim=1).max())
        row(name, time_, wanted, torch.cat(objectives).sum(), max(gaps), norm)

    whole("ours", seconds, "", *found)
    lines = _clarabel(halves, count, row)
    peer, arrays = TorchidlSolver(num_epoch_ab=theirs), [states[name].numpy() for name in "XUZY"]
    torch.manual_seed(0)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # a line per step
        start = time.perf_counter()
        weights = peer.solve(*arrays, {**config, "device": "cpu"})
        taken = time.perf_counter() - start
    whole("torchidl 0.0.4 ADMM, at its defaults", taken, "≥ 20", *map(torch.as_tensor, weights))
    print("\nThe ten rows")
    header("row", "ours", "Clarabel, defaults", "Clarabel, exact", "relative difference of ours and exact", "wanted")
    for name, ours, found, exact in lines:
        print(f"| {name} | {ours:.9g} | {found:.9g} | {exact:.9g} | {abs(ours / exact - 1):.1e} | ≤ 1e-6 |", flush=True)


def _clarabel(halves: list[Half], count: int, row: Callable[..., None]) -> list[tuple[str, float, float, float]]:
    """Ten rows at Clarabel's defaults, which are timed, and as exactly as it goes, which is what ours should equal.

    Returns:
        What each row is called, and its objective by ours, by the defaults and exactly.
    """
    lines, seconds, gaps, norms = [], 0.0, [], []
    plain, exact = (CVXSolver(lambda_z=LAMBDA, lambda_y=LAMBDA, **settings) for settings in ({}, EXACT))
    for name, half, chosen in zip(("A, B", "C, D"), halves, (HIDDEN, OUTPUT), strict=True):
        half.problem.systems  # noqa: B018  our certificate needs it, and Clarabel's time does not
        for index in chosen:
            rows = torch.tensor([index])
            problem = half.problem[rows]
            start = time.perf_counter()
            w = plain.solve_rows(problem).w
            seconds += time.perf_counter() - start
            reached = half.objectives(w, rows)
            gaps.append(half.gap(reached, rows))
            norms.append(float(w[:, : problem.n].abs().sum()) if problem.kappa < math.inf else 0.0)
            best = half.objectives(exact.solve_rows(problem).w, rows)
            lines.append((f"{name}: {index}", float(half.objective[index]), float(reached), float(best)))
    scale = count / len(lines)
    ours, found = (sum(line[k] for line in lines) for k in (1, 2))
    name = f"CVXPY + Clarabel, {len(lines)} rows, s × {scale:g} (ours on these: objective {ours:.2f})"
    row(name, seconds * scale, "≥ 300", found, max(gaps), max(norms))
    return lines


if __name__ == "__main__":
    torch.set_num_threads(2)
    run()
