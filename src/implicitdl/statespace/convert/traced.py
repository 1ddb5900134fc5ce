"""A tensor inside a network: what torch holds for some inputs, beside the affine function that it is for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from ..space import version
from .affine import Affine, NoFormError
from .rules import CONSTANTS, SHAPES, VIEW_ATTRIBUTES, rule_of


class Memory:
    """What a piece of torch's memory holds: a value, and the number of the entry that lies at every place."""

    def __init__(self, value: Affine, real: Tensor) -> None:
        self._value = value
        self._numbers = torch.full(
            (real.untyped_storage().nbytes() // real.element_size(),), -1, dtype=torch.int64, device=real.device
        )
        self._of(real).copy_(value.numbers())

    def _of(self, real: Tensor) -> Tensor:
        return self._numbers.as_strided(real.shape, real.stride(), real.storage_offset())

    def read(self, real: Tensor) -> Affine:
        """What the view holds."""
        return self._value.moved(self._of(real))

    def write(self, real: Tensor, value: Affine) -> None:
        """Put a value where the view looks."""
        self._value = self._value.written(self._of(real), value)


class Traced:
    """Takes the place of a tensor when the network's modules and functions are run.

    Torch hands its operations to `__torch_function__`.  Each is done to the real tensors, which shows what it writes
    to and what its result shares memory with, as views do; a rule says what it makes of the values, and the two must
    agree.
    """

    def __init__(self, memory: Memory, real: Tensor) -> None:
        self.memory, self.real = memory, real

    @classmethod
    def new(cls, value: Affine, real: Tensor) -> Traced:
        return cls(Memory(value, real), real)

    @property
    def value(self) -> Affine:
        return self.memory.read(self.real)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.real, name)
        if callable(found):
            return partial(apply, name, getattr(Tensor, name), self)
        if not isinstance(found, Tensor):
            return found
        if name not in VIEW_ATTRIBUTES:
            raise NoFormError(f"its {name} is not followed. Leave it out")
        return apply(name, lambda tensor: getattr(tensor, name), self)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # An operation of an exported program has its overload's name behind its own.
        return apply(function.__name__.partition(".")[0], function, *args, **(kwargs or {}))

    def _number(self, *_: Any) -> Any:
        raise NoFormError("its control flow or its numbers depend on the data. Write it without")

    __bool__ = __len__ = __iter__ = __float__ = __int__ = __index__ = __contains__ = _number
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _number
    __hash__ = object.__hash__


def apply(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the operation makes of its arguments, at least one of which is traced."""
    traced, plain = _tensors((args, kwargs))
    before = [(tensor, version(tensor), tensor.stride()) for tensor in [*plain, *(t.real for t in traced)]]
    with torch.no_grad():
        result = function(*_mapped(args, _real), **_mapped(kwargs, _real))
    written = [tensor for tensor, old, _ in before if version(tensor) != old]
    if any(tensor.stride() != stride for tensor, _, stride in before):
        raise NoFormError(f"{name} changes the shape of a tensor in place. Use the form that returns another one")
    if written:
        return _in_place(name, function, args, kwargs, result, written, traced)
    if name in CONSTANTS or (name in SHAPES and not isinstance(result, Tensor)):
        return result
    seen = _views(result, traced) if name not in ("detach", "data") else None
    if seen is not None:
        return seen
    value = rule_of(name, in_place=False)(function, *_mapped(args, _value), **_mapped(kwargs, _value))
    return _beside(name, value, result)


def _in_place(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    written: list[Tensor],
    traced: list[Traced],
) -> Traced:
    target = next((t for t in traced if t.real is result), None)
    if target is None or any(not _shared(tensor, target.real) for tensor in written):
        raise NoFormError(
            f"{name} writes into a tensor that is not the one it returns, or that does not depend on the input. "
            "Use the form that returns another one"
        )
    value = rule_of(name, in_place=True)(function, *_mapped(args, _value), **_mapped(kwargs, _value))
    _agree(name, value, target.real)
    target.memory.write(target.real, value)
    return target


def _beside(name: str, value: Any, real: Any) -> Any:
    """What the rule and torch have found, as one."""
    if isinstance(value, Affine):
        _agree(name, value, real)
        return Traced.new(value, real)
    parts = real.unbind(0) if isinstance(real, Tensor) else real
    return type(value)(_beside(name, *pair) for pair in zip(value, parts, strict=True))


def _agree(name: str, value: Affine, real: Any) -> None:
    if not isinstance(real, Tensor) or real.dtype != value.dtype or real.device != value.device:
        raise NoFormError(f"{name} gives another dtype than the network's. Leave it out")
    if real.shape != value.shape:
        raise NoFormError(f"{name} gives the shape {tuple(real.shape)}, which is not followed. Leave it out")
    gap = value.net.far(value.net.evaluated(value), real)
    if gap is not None:
        raise NoFormError(f"{name} gives other numbers than its rule, by {gap:.3g}. Leave it out")


def _views(result: Any, traced: list[Traced]) -> Any:
    """Results that share memory with an argument, as views of what that holds; None when any does not."""
    if isinstance(result, Tensor):
        source = next((t for t in traced if _shared(t.real, result) and t.real.dtype == result.dtype), None)
        return None if source is None else Traced(source.memory, result)
    if not isinstance(result, (tuple, list)):
        return None
    parts = [_views(part, traced) for part in result]
    return None if any(part is None for part in parts) else type(result)(parts)


def _shared(one: Tensor, other: Tensor) -> bool:
    return 0 != one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _tensors(structure: Any) -> tuple[list[Traced], list[Tensor]]:
    traced: list[Traced] = []
    plain: list[Tensor] = []

    def see(leaf: Any) -> Any:
        if isinstance(leaf, Traced):
            traced.append(leaf)
        elif isinstance(leaf, Tensor):
            plain.append(leaf)
        return leaf

    map_aggregate(structure, see)
    return traced, plain


def _mapped(structure: Any, f: Callable[[Any], Any]) -> Any:
    return map_aggregate(structure, f)


def _real(leaf: Any) -> Any:
    return leaf.real if isinstance(leaf, Traced) else leaf


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Traced) else leaf
