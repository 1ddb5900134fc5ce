"""From the names in the options to the data, the optimiser and the device."""

from __future__ import annotations

import math
from typing import Any

import torch

from .._internal.errors import positive_int, wrong
from ..data import Data, load
from ..nn import ImplicitModel, JacobianPenalty
from ..training.evaluate import Loss
from .models import Model
from .options import Options

# Far more than help; a hundred thousand would end the process when the first of them is started.
_MOST_THREADS = 1024


def data(options: Options, root: str | None = None) -> Data:
    """The dataset in its three parts; `root` comes before the option."""
    where = options.root if root is None else root
    return load(options.data, options.batch_size, where, holdout=options.holdout, seed=options.split_seed)


def optimizer(options: Options, parameters: Any) -> torch.optim.Optimizer:
    # fused: one kernel for all parameters, where a small model would spend most of a step in the calls.
    lr, weight_decay = options.lr, options.weight_decay
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=True)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=True)
    momentum = 0.9 if options.momentum is None else options.momentum
    return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=True)


def loss(options: Options, model: Model) -> Loss:
    """Cross-entropy; in training with the Jacobian's term where it was asked for."""
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    if options.jac_reg is None:
        return cross_entropy
    assert not isinstance(model, ImplicitModel)
    penalty = JacobianPenalty(model.deq, options.jac_reg)
    return lambda pred, target: cross_entropy(pred, target) + penalty()


def scheduler(options: Options, opt: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Steps with every batch; its plan is saved with the run and holds after a resume."""
    return torch.optim.lr_scheduler.LambdaLR(opt, Schedule(options.schedule, steps, options.warmup))


class Schedule:
    """The factor of the learning rate at a step: a linear rise, then the named course over the rest.

    A class and not a closure, because LambdaLR keeps the attributes of an object in its state_dict.
    """

    def __init__(self, name: str, steps: int, warmup: float) -> None:
        self.name, self.steps, self.rise = name, steps, max(1, round(warmup * steps))

    def __call__(self, step: int) -> float:
        if step < self.rise:
            return (step + 1) / self.rise
        done = min(1.0, (step - self.rise) / max(1, self.steps - self.rise))
        if self.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.name == "step":
            return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
        return 1.0


def threads(who: str, count: int | None) -> None:
    """As many threads of PyTorch's as asked for."""
    if count is None:
        return
    if positive_int(who, "--threads", count) > _MOST_THREADS:
        raise wrong(who, f"--threads of at most {_MOST_THREADS}", count)
    torch.set_num_threads(count)


def device(who: str, name: str | None) -> torch.device:
    """A device that is there."""
    try:
        place = torch.zeros(1, dtype=torch.float32, device="cpu" if name is None else name)
        place.item()  # "meta" has no numbers
        return place.device
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise wrong(who, "--device to be one that is here, such as cpu", f"{name!r} ({reason})") from error
