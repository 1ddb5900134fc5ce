"""f as one map for one solve: one draw of its noise, one update of its running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import RLock
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from .._internal.errors import wrong

# Containers of more entries than this hold data, not layers.
_LAYERS_AT_MOST = 1000
# Torch's generators belong to all threads: a solve that sets them back has them to itself for one evaluation.
_GENERATORS = RLock()
_FUNCTIONS = (FunctionType, MethodType, partial)


class Frozen:
    """f, evaluated many times as if once: with the same noise each time, and from the buffers it had before.

    A map that draws another dropout mask, or moves its batch norm, on every evaluation has no fixed point.  Here the
    generators are set back before every evaluation but the first, so that a solve draws what one evaluation draws,
    and Modules in training mode are evaluated on copies of their buffers; `settle` writes those of the last
    evaluation back.  Both are found by looking at what the first evaluation did, so dropout by a function is seen like
    dropout by a module, a map without noise and buffers pays for reading a generator twice, and a buffer that f does
    not move is never written.

    The Modules are those that f is, is bound to, closes over, names, or has as the arguments of a
    `functools.partial`: see `modules_of`.

    Not seen: noise from a `torch.Generator` of the user's, Python's or numpy's streams; and buffers of a Module that
    is hidden deeper, such as in an attribute of an object that f closes over.

    Arguments:
        f: ``f(x, *args)``; a Module, or any function.
    """

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = self.__wrapped__ = f
        self._modules = list(modules_of(f))
        self._first = True
        # The generators before the first evaluation; None where it drew nothing.
        self._noise: list[Tensor] | None = None
        self._drawn: list[Tensor] = []  # and after it
        # The buffers that an evaluation may move, and after the first one those that it moves.
        self._buffers = _held(module for module in self._modules if module.training)
        self._modes = self._training()
        # Batch norm that tracks no statistics normalises by those of the batch in evaluation, too.
        normed = (module for module in self._modules if isinstance(module, _BatchNorm))
        self._untracked = any(module.running_mean is None for module in normed)

    @property
    def coupled(self) -> bool:
        """Whether f normalises by statistics of the batch, so that its samples depend on each other.

        Statistics that are tracked tell by moving: before the first evaluation they may, after it they do.
        """
        return self._untracked or any(isinstance(held.owner, _BatchNorm) for held in self._buffers)

    @property
    def buffered(self) -> bool:
        """Whether an evaluation moves buffers."""
        return bool(self._buffers)

    @property
    def divisible(self) -> bool:
        """Whether samples may leave the batch: noise has its shape, batch norm its statistics.

        Either may have come in where the mode of a Module was changed between the solve and its backward.
        """
        return not self.coupled and self._noise is None and self._training() == self._modes

    def look(self, evaluate: Callable[[], Any]) -> bool:
        """Whether f is coupled, by one more evaluation where only that can tell."""
        if self._first and self.coupled and not self._untracked:
            with torch.no_grad():
                evaluate()
        return self.coupled

    def __call__(self, *args: Any) -> Any:
        device = _device(args[0])
        if self._first:
            self._first = False
            with _GENERATORS:
                before = _generators(device)
                fx = self._evaluate(args)
                after = _generators(device)
            if not _equal(before, after):
                self._noise, self._drawn = before, after
            self._buffers = [held for held in self._buffers if not torch.equal(held.before, held.after)]
            return fx
        if self._noise is None:
            return self._evaluate(args)
        with _GENERATORS, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.set_rng_state(self._noise[0])
            for state in self._noise[1:]:
                torch.cuda.set_rng_state(state, device)
            fx = self._evaluate(args)
            drawn = _generators(device)
        if not _equal(drawn, self._drawn):
            if _equal(drawn, self._noise):  # it was another thread that drew in the first evaluation, and not f
                self._noise = None
                return fx
            raise wrong(
                "f", "the same noise in every evaluation", "other draws than in the first one",
                "Draw from torch's generators in one thread at a time, and as often whatever x is.",
            )  # fmt: skip
        return fx

    def settle(self) -> None:
        """Give the Modules the buffers of the last evaluation, once, where the solve is over."""
        with torch.no_grad():
            for held in self._buffers:
                # torch's own layers move their statistics without a new version: backward does not read them.
                buffer = held.buffer.data if isinstance(held.owner, _NormBase) else held.buffer
                buffer.copy_(held.after)

    def _evaluate(self, args: tuple[Any, ...]) -> Any:
        if not self._buffers:
            return self._f(*args)
        # Copies, and not the buffers set back afterwards: autograd keeps them, and would find them changed.
        copies = {id(held.buffer): held.before.clone() for held in self._buffers}
        try:
            for held in self._buffers:
                held.owner._buffers[held.name] = copies[id(held.buffer)]
            return self._f(*args)
        finally:
            for held in self._buffers:
                after = held.owner._buffers[held.name]
                held.after = held.before if after is None else after
                held.owner._buffers[held.name] = held.buffer

    def _training(self) -> list[bool]:
        return [module.training for module in self._modules]


def modules_of(f: Any) -> Iterator[nn.Module]:
    """The Modules that an evaluation of f may use, and theirs, each once.

    They are looked for in f itself, and in what a function is bound to, closes over, has as default arguments, or
    names; in the arguments of a `functools.partial`; in lists, tuples and dicts of these; and in the functions and
    attributes of callable objects found there.
    """
    seen: set[int] = set()
    stack = [f]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            yield part
            stack.extend(part._modules.values())
            stack.extend(value for value in vars(part).values() if isinstance(value, _FUNCTIONS))
        else:
            stack.extend(_parts(part))


def _parts(part: Any) -> Iterable[Any]:
    """Where a Module may be that ``part``, which is none, makes use of."""
    if isinstance(part, partial):
        return (part.func, *part.args, *part.keywords.values())
    if isinstance(part, MethodType):
        return (part.__self__, part.__func__)
    if isinstance(part, FunctionType):
        cells = [content for cell in part.__closure__ or () for content in _contents(cell)]
        named = [part.__globals__.get(name) for name in _names(part.__code__)]
        return (*cells, *named, *(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values())
    if isinstance(part, (list, tuple, dict)):
        values = part.values() if isinstance(part, dict) else part
        return values if len(part) <= _LAYERS_AT_MOST else ()
    if callable(part) and not isinstance(part, type) and hasattr(part, "__dict__"):
        return vars(part).values()
    return ()


def _names(code: CodeType) -> Iterator[str]:
    """What a function, and the functions written inside of it, name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _contents(cell: Any) -> tuple[Any, ...]:
    """What a closure's cell holds: nothing before the variable is assigned."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


@dataclass(slots=True)
class _Held:
    """A buffer: its Module and name there, its values before the solve, and those after the last evaluation."""

    owner: nn.Module
    name: str
    buffer: Tensor
    before: Tensor
    after: Tensor


def _held(modules: Iterable[nn.Module]) -> list[_Held]:
    return [
        _Held(module, name, buffer, copy := buffer.clone(), copy)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _device(x: Tensor | tuple[Tensor, ...]) -> torch.device:
    return (x[0] if isinstance(x, tuple) else x).device


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _equal(states: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, states, others))
