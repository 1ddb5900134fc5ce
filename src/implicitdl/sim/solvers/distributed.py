"""Rows of a problem in batches, and batches among the processes of torch.distributed."""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..._internal.errors import wrong
from ..certificate import RowReport, RowSolution
from ..problem import RowProblem

# One process makes as many batches as two, so that both find the same, digit for digit: on nearly rank-deficient data
# rounding, which depends on the batch, decides when a row stops.
_LEAST = 2
# Sums of the same states differ by less, relatively, whatever the machine.
_ROUNDING = 1e-10

SolveRows = Callable[[RowProblem, RowSolution | None], RowSolution]


def join(device: torch.device) -> None:
    """Join the processes that torchrun started, by NCCL with GPUs and by Gloo without, unless the script has."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def same_states(who: str, states: tuple[Tensor, ...]) -> None:
    """An error, in every process, unless all have the same states up to rounding."""
    if _place()[1] == 1:
        return
    mine = torch.stack([_digest(matrix) for matrix in states])
    extremes = torch.stack([mine, -mine])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, least = extremes[0], -extremes[1]
    differ = (largest - least > _ROUNDING * largest[:, :1]).any(dim=1)
    if bool(differ.any()):
        named = ", ".join(name for name, one in zip("XUZY", differ.tolist(), strict=True) if one)
        raise wrong(who, "the same states in every process", f"{named} that differ", "Seed what shuffles the samples.")


def _digest(matrix: Tensor) -> Tensor:
    """A size, at least 1, that bounds the rounding of the rest: a sum over all entries, and the shape."""
    rows, samples = matrix.shape
    sums = matrix.sum(dim=1, dtype=torch.float64)
    weights = torch.linspace(1, 2, rows, dtype=torch.float64, device=matrix.device)
    size = math.sqrt(rows * samples) * (1 + torch.linalg.vector_norm(matrix, dtype=torch.float64))
    return torch.stack([size, weights @ sums, *size.new_tensor([rows, samples])])


@dataclass
class Future:
    """The solution of all rows, in every process.

    Attributes:
        packed: (rows, n + p + fields of the report).
        n: states, the entries of a.
        pending: the sum of `packed` over the processes that is under way; None where it is made.
    """

    packed: Tensor
    n: int
    pending: Any = None

    @classmethod
    def of(cls, found: RowSolution) -> Future:
        """A solution that every process has already."""
        return cls(_pack(found), found.a.shape[1])

    def result(self) -> RowSolution:
        """The solution; waits for the other processes where there are any."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        width = self.packed.shape[1] - len(fields(RowReport))
        objective, gap, norm, support, rounding, converged = self.packed[:, width:].unbind(dim=1)
        report = RowReport(objective, gap, norm, support.long(), rounding, converged.bool())
        return RowSolution(self.packed[:, : self.n], self.packed[:, self.n : width], report)


def in_batches(
    solve: SolveRows, problem: RowProblem, start: RowSolution | None, size: int, on_progress: Callable[[int], None]
) -> Future:
    """Solve the rows in batches of at most so many, this process its share of the batches.

    Rows are dealt to the batches in turn: neighbours belong to one layer of the teacher and are about equally hard.
    The result depends on the batches only by rounding, and the batches not on whether there are one or two processes.
    Nobody waits here: where one has the harder rows of one problem, another may have those of the next.

    Arguments:
        solve: solves a batch.
        problem: all rows; every process has them, and all samples.
        start: of all rows, or None.
        size: most rows of a batch.
        on_progress: told how many more rows are done, by all processes together.
    """
    rank, world = _place()
    rows, width = problem.shape
    count = min(rows, max(world, _LEAST, -(-rows // size)))
    if world > 1:
        problem.gram_of_all(rank, world, dist.all_reduce)
    problem.systems  # noqa: B018  made once here, and kept by every batch
    packed = torch.zeros(rows, width + len(fields(RowReport)), dtype=torch.float64, device=problem.T.device)
    for first in range(rank, count, world):
        batch = torch.arange(first, rows, count, device=packed.device)
        packed[batch] = _pack(solve(problem[batch], None if start is None else start[batch]))
        on_progress(len(batch) * world)
    # Every row is zero in all processes but one.
    return Future(packed, problem.n, dist.all_reduce(packed, async_op=True) if world > 1 else None)


def _place() -> tuple[int, int]:
    """Which process this is, of how many."""
    return (dist.get_rank(), dist.get_world_size()) if _joined() else (0, 1)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _pack(solution: RowSolution) -> Tensor:
    report = [getattr(solution.report, field.name).double() for field in fields(RowReport)]
    return torch.cat([solution.a, solution.b, torch.stack(report, dim=1)], dim=1)
