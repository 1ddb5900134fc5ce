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
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from .._internal.errors import choice, extra, wrong

Precision = Literal["no", "bf16", "fp16"]
PRECISIONS = get_args(Precision)
Device = str | torch.device


@contextlib.contextmanager
def processes(device: Device | None, precision: Precision | None) -> Iterator[tuple[Any, torch.device]]:
    """Open accelerate for one run, and leave its globals and the random streams as they were.

    accelerate keeps device and precision in process-wide singletons that refuse to change: without this, a second run
    in bf16, or a run after the user's own Accelerator, would fail.

    Returns:
        ``(accelerator, device)``: an `accelerate.Accelerator`, and the device of this process.
    """
    choice("train", "mixed_precision", precision, (None, *PRECISIONS))
    try:
        asked = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise wrong("train", "a device such as 'cpu' or 'cuda:0'", repr(device), "Or leave device=None.") from error
    state = extra("accelerate.state", "train")
    shared = [kind._shared_state for kind in (state.PartialState, state.AcceleratorState, state.GradientState)]
    before = [dict(values) for values in shared]
    for values in shared:
        values.clear()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        accelerator = _joined(asked, precision)
        own = accelerator.device if asked is None or accelerator.num_processes > 1 else asked
        if accelerator.mixed_precision == "fp16" and own.type == "cpu":
            raise wrong("train", "an accelerator for mixed_precision='fp16'", "the CPU", "Use 'bf16' on the CPU.")
        index = (own.index if own.index is not None else torch.cuda.current_device()) if own.type == "cuda" else None
        with torch.random.fork_rng(devices=[] if index is None else [index]):
            yield accelerator, own
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for values, old in zip(shared, before, strict=True):
            values.clear()
            values.update(old)


def _joined(asked: torch.device | None, precision: Precision | None) -> Any:
    """The Accelerator, which joins the other processes; raises where the launch asks for what `train` does not do."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Under torchrun without a GPU, accelerate joins the processes only when it is told "CPU".
    cpu = asked.type == "cpu" if asked is not None else several and not torch.cuda.is_available()
    member = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        accelerator = extra("accelerate", "train").Accelerator(
            device_placement=False, mixed_precision=precision, cpu=cpu
        )
    except ValueError as error:
        raise wrong("train", "a precision that this machine has", repr(precision), str(error)) from error
    if several and not member and torch.distributed.is_initialized():
        # NCCL complains at exit about a group that nobody left; whoever joined it has to leave it.
        atexit.register(_leave_group)
    own, count = accelerator.device, accelerator.num_processes
    if several and count == 1:
        do = "Leave device=None, or pass device='cpu' where there is no GPU for each."
        expected = f"{os.environ['WORLD_SIZE']} processes, as this one was launched"
        raise wrong("train", expected, "1 that could be joined", do)
    if asked is not None and (asked.type != own.type or (count > 1 and asked.index not in (None, own.index))):
        raise wrong("train", f"a device that this process has ({own})", f"'{asked}'", "Leave device=None.")
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise wrong("train", "data-parallel processes", kind, "Launch with torchrun or plain accelerate launch.")
    if accelerator.mixed_precision not in PRECISIONS:
        do = "Launch with another one."
        raise wrong("train", "mixed precision no, bf16 or fp16", accelerator.mixed_precision, do)
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise wrong("train", "no gradient accumulation", f"{steps} steps", "Use larger batches instead.")
    return accelerator


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share(accelerator: Any, loader: Iterable[Any], even: bool) -> Iterable[Any]:
    """This process's part of a loader's batches; `even` repeats samples until all have equally many."""
    if accelerator.num_processes == 1 or isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return loader
    if not isinstance(loader, DataLoader):
        raise wrong("train", "a DataLoader, to share it among processes", type(loader).__name__, "")
    count, rank = accelerator.num_processes, accelerator.process_index
    prepare = extra("accelerate.data_loader", "train").prepare_data_loader
    return prepare(loader, num_processes=count, process_index=rank, even_batches=even)


def epoch_batches(loader: Iterable[Any], seed: int, epoch: int, rank: int) -> Iterator[Any]:
    """The batches of one epoch, in the order that (seed, epoch) decides, whatever happened before.

    The streams from which a loader draws its order are the same in all processes, or their shares would overlap. The
    order is drawn with the first batch; after it, dropout is each process's own.
    """
    seed_loader(loader, seed, epoch)
    _seed_streams(_mix(seed, epoch))
    batches = iter(loader)
    first = list(itertools.islice(batches, 1))
    if rank > 0:
        _seed_streams(_mix(seed, epoch, rank))
    return itertools.chain(first, batches)


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
