"""ADMMMultiGPUSolver: the default solver, a process a device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._internal.errors import wrong
from .admm import ADMMSolver
from .base_solver import ModelConfig, SIMSolution
from .distributed import join


@dataclass(frozen=True, kw_only=True)
class ADMMMultiGPUSolver(ADMMSolver):
    """`ADMMSolver` on several devices: each process solves a share of the rows, on a GPU of its own or on the CPU.

    Start one process a device with ``torchrun --nproc-per-node=2 script.py``; the solver joins them, by NCCL with
    GPUs and by Gloo without, unless the script has.  Every process must be given the same states, and gets the whole
    solution, on the states' device.  Alone, it is `ADMMSolver` on one GPU.

    Arguments:
        gpu_ids: the GPUs of this machine to use, the first for the first process; None for all in order.
        all others: as for `ADMMSolver`.

    Raises:
        ArgumentError: a GPU that is not there, or fewer GPUs than processes; states that differ between processes.
    """

    gpu_ids: Sequence[int | torch.device] | None = None

    def fit(
        self,
        X: Tensor,
        U: Tensor,
        Z: Tensor,
        Y: Tensor,
        model_config: ModelConfig | None = None,
        *,
        start: SIMSolution | None = None,
        **options: Any,
    ) -> SIMSolution:
        device = self._device()
        join(device)
        x, u, z, y = (states.to(device) for states in (X, U, Z, Y))
        before = None if start is None else start.to(device)
        return super().fit(x, u, z, y, model_config, start=before, **options).to(X.device)

    def _device(self) -> torch.device:
        count = torch.cuda.device_count()
        given = range(count) if self.gpu_ids is None else self.gpu_ids
        ids = [gpu.index or 0 if isinstance(gpu, torch.device) else gpu for gpu in given]
        if not ids:
            return torch.device("cpu")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= len(ids) or ids[local] >= count:
            got = f"process {local}, gpu_ids={ids}, {count} GPUs"
            raise wrong("ADMMMultiGPUSolver", "a GPU for every process", got, "Start fewer processes with torchrun.")
        return torch.device("cuda", ids[local])
