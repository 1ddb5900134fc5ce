"""f as one map for one solve: one draw of its noise, one update of its running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Frozen:
    """f, evaluated many times as if once: with the same noise each time, and from the buffers it had before.

    A map that draws another dropout mask, or moves its batch norm, on every evaluation has no fixed point.  Here the
    generators are set back before every evaluation but the first, so that a solve draws what one evaluation draws,
    and a Module in training mode is evaluated on copies of its buffers; `settle` writes back those of the last
    evaluation.  Both are found by looking at what the first evaluation did, so dropout by a function is seen like
    dropout by a module, and a map without noise and buffers pays for reading a generator twice.

    Not seen: noise from a `torch.Generator` of the user's, Python's or numpy's streams; and buffers of a Module that
    f closes over instead of being it.

    Arguments:
        f: ``f(x, *args)``; a Module, or any function.
    """

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = f
        self._module = f if isinstance(f, nn.Module) else None
        self._first = True
        # The generators before the first evaluation; None where it drew nothing.
        self._noise: list[Tensor] | None = None
        # The buffers that an evaluation moves: the Module's own, their values before, and after the last evaluation.
        self._buffers: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._after: dict[str, Tensor] = {}
        #: Whether the samples of a batch depend on each other.
        self.coupled = False
        if self._module is not None:
            for prefix, module in self._module.named_modules():
                self.coupled |= _uses_batch_statistics(module)
                if module.training:
                    self._buffers |= module.named_buffers(prefix, recurse=False)
            self._before = _copies(self._buffers)
        self._modes = self._training()

    @property
    def divisible(self) -> bool:
        """Whether samples may leave the batch: noise has its shape, batch norm its statistics.

        Either may have come in where the mode of a Module was changed between the solve and its backward.
        """
        return not self.coupled and self._noise is None and self._training() == self._modes

    def _training(self) -> list[bool]:
        return [] if self._module is None else [module.training for module in self._module.modules()]

    def __call__(self, *args: Any) -> Any:
        device = _device(args[0])
        if self._first:
            self._first = False
            before = _generators(device)
            fx = self._evaluate(args)
            if not all(map(torch.equal, before, _generators(device))):
                self._noise = before
            if all(torch.equal(buffer, self._after[name]) for name, buffer in self._before.items()):
                self._buffers = self._before = {}
            return fx
        if self._noise is None:
            return self._evaluate(args)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.set_rng_state(self._noise[0])
            for state in self._noise[1:]:
                torch.cuda.set_rng_state(state, device)
            return self._evaluate(args)

    def settle(self) -> None:
        """Give the Module the buffers of the last evaluation, once, where the solve is over."""
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                buffer.copy_(self._after[name])

    def _evaluate(self, args: tuple[Any, ...]) -> Any:
        if not self._before:
            return self._f(*args)
        assert self._module is not None
        # Copies, and not the buffers set back afterwards: autograd keeps them, and would find them changed.
        self._after = _copies(self._before)
        return torch.func.functional_call(self._module, self._after, args)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _uses_batch_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _device(x: Tensor | tuple[Tensor, ...]) -> torch.device:
    return (x[0] if isinstance(x, tuple) else x).device


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
