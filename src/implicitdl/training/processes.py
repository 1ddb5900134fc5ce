"""Device, precision and processes (accelerate), and the random streams that make a run repeat itself."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from .._internal.errors import choice, extra, wrong

Precision = Literal["no", "bf16", "fp16"]
PRECISIONS = get_args(Precision)
Device = str | torch.device


class Processes:
    """What a run needs to know of where it runs: device, precision, and its place among the processes."""

    def __init__(self, device: Device | None, precision: Precision | None) -> None:
        asked = _device(device)
        choice("train", "mixed_precision", precision, (None, *PRECISIONS))
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        # Under torchrun without a GPU, accelerate joins the processes only when it is told "CPU".
        cpu = asked.type == "cpu" if asked is not None else several and not torch.cuda.is_available()
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        try:
            self.accelerator = extra("accelerate", "train").Accelerator(
                device_placement=False, mixed_precision=precision, cpu=cpu
            )
        except ValueError as error:
            raise wrong("train", "a precision that this machine has", repr(precision), str(error)) from error
        if several and not joined and torch.distributed.is_initialized():
            # NCCL complains at exit about a group that nobody left; whoever joined it has to leave it.
            atexit.register(_leave_group)
        self.count: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.main: bool = self.accelerator.is_main_process
        self.device = self._agreed(asked, several)
        self.scaler = self.accelerator.scaler
        self._check()

    def _agreed(self, asked: torch.device | None, several: bool) -> torch.device:
        own = self.accelerator.device
        if several and self.count == 1:
            raise wrong(
                "train",
                f"{os.environ['WORLD_SIZE']} processes, as this one was launched",
                "1 that could be joined",
                "Leave device=None, or pass device='cpu' where there is no GPU for each.",
            )
        if asked is None:
            return own
        if asked.type != own.type or (self.count > 1 and asked.index not in (None, own.index)):
            raise wrong("train", f"a device that this process has ({own})", f"'{asked}'", "Leave device=None.")
        return own if self.count > 1 else asked

    def _check(self) -> None:
        kind = self.accelerator.distributed_type.value
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
            raise wrong("train", "data-parallel processes", kind, "Launch with torchrun or plain accelerate launch.")
        precision = self.accelerator.mixed_precision
        if precision not in PRECISIONS:
            raise wrong("train", "mixed precision no, bf16 or fp16", precision, "Launch with another one.")
        if precision == "fp16" and self.device.type == "cpu":
            raise wrong("train", "an accelerator for mixed_precision='fp16'", "the CPU", "Use 'bf16' on the CPU.")
        if self.accelerator.gradient_accumulation_steps != 1:
            steps = self.accelerator.gradient_accumulation_steps
            raise wrong("train", "no gradient accumulation", f"{steps} steps", "Use larger batches instead.")

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """(for training, for validation): both compute in the run's precision, the first averages gradients.

        accelerate changes `forward` of the module it prepares: here a thin one around the user's, which stays
        as it was. Validation does without DistributedDataParallel: processes may have fewer batches there.
        """
        alone = _Forward(model)
        return self.accelerator.prepare_model(alone), alone

    def share(self, loader: Iterable[Any], even: bool) -> Iterable[Any]:
        """This process's part of a loader's batches; `even` repeats samples until all have equally many."""
        if self.count == 1 or isinstance(getattr(loader, "sampler", None), DistributedSampler):
            return loader
        if not isinstance(loader, DataLoader):
            raise wrong("train", "a DataLoader, to share it among processes", type(loader).__name__, "")
        prepare = extra("accelerate.data_loader", "train").prepare_data_loader
        return prepare(loader, num_processes=self.count, process_index=self.rank, even_batches=even)

    def sum(self, figures: list[float]) -> list[float]:
        """Each figure summed over the processes."""
        if self.count == 1:
            return figures
        total = torch.tensor(figures, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def agree(self, seed: int) -> int:
        """The main process's seed."""
        if self.count == 1:
            return seed
        shared = torch.tensor(seed, dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return int(shared)

    def agree_buffers(self, model: nn.Module) -> None:
        """The main process's buffers everywhere: batch statistics differ, and one of them is saved."""
        if self.count > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def wait(self) -> None:
        if self.count > 1:
            self.accelerator.wait_for_everyone()


class _Forward(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return self.model(inputs)


@contextlib.contextmanager
def processes(device: Device | None, precision: Precision | None) -> Iterator[Processes]:
    """Open accelerate for one run and leave its globals as they were.

    accelerate keeps device and precision in process-wide singletons that refuse to change: without this, a
    second run in bf16, or a run after the user's own Accelerator, would fail.
    """
    state = extra("accelerate.state", "train")
    shared = [kind._shared_state for kind in (state.PartialState, state.AcceleratorState, state.GradientState)]
    before = [dict(values) for values in shared]
    for values in shared:
        values.clear()
    try:
        yield Processes(device, precision)
    finally:
        for values, old in zip(shared, before, strict=True):
            values.clear()
            values.update(old)


def move(batch: Any, device: torch.device) -> Any:
    """A batch (tensors in any nesting of lists, tuples and dicts) on the device."""
    ahead = device.type == "cuda"  # towards the CPU it would be read before it is there
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=ahead)
    return extra("accelerate.utils", "train").send_to_device(batch, device, non_blocking=ahead)


def _device(device: Device | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise wrong("train", "a device such as 'cpu' or 'cuda:0'", repr(device), "Or leave device=None.") from error


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def draw_seed() -> int:
    """One number from torch's global stream, so that torch.manual_seed decides it."""
    return int(torch.randint(2**31, (), device="cpu"))


@contextlib.contextmanager
def borrowed_streams(device: torch.device) -> Iterator[None]:
    """Reseed the global random streams at will inside; afterwards they are where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    cuda = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def epoch_batches(loader: Iterable[Any], seed: int, epoch: int, rank: int) -> Iterator[Any]:
    """The batches of one epoch, in the order that (seed, epoch) decides, whatever happened before.

    The streams from which a loader draws its order are the same in all processes, or their shares would
    overlap. The order is drawn with the first batch; after it, dropout is each process's own.
    """
    seed_loader(loader, seed, epoch)
    _seed_streams(_mix(seed, epoch))
    batches = iter(loader)
    try:
        first = next(batches)
    except StopIteration:
        return iter(())
    if rank > 0:
        _seed_streams(_mix(seed, epoch, rank))
    return itertools.chain([first], batches)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _seed_streams(seed: int) -> None:
    torch.manual_seed(seed)  # every device's
    random.seed(seed)
    np.random.seed(seed % 2**32)  # all that numpy's global stream takes


def seed_loader(loader: Any, seed: int, epoch: int) -> None:
    """A loader's own generators do not listen to the global seed; samplers may count epochs themselves."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(batch_sampler, "batch_sampler", None)  # accelerate's share of a batch sampler
    parts = [loader, getattr(loader, "dataset", None), getattr(loader, "sampler", None), batch_sampler, inner]
    parts += [getattr(part, "sampler", None) for part in (batch_sampler, inner)]
    for part in parts:
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generator.manual_seed(_mix(seed, epoch))
        if callable(count := getattr(part, "set_epoch", None)):
            count(epoch)
