"""What a solve asks of f: values like the state, in tensors of their own, and nothing changed of what f is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.context import autocast_dtype
from .._internal.errors import wrong

# Evaluations after which a tensor that f fills again and again has been seen twice, also where f takes two in turn.
_SEEN_AFTER = 3
_OTHER_SHAPE = (
    "The state is shaped like x0, in a DEQ without x0= like u: pass x0=torch.zeros(batch, *state) for another."
)
_IN_PLACE = "Write v * 2 for v.mul_(2), and ReLU() for ReLU(inplace=True) where it meets what f is given."


class Contract:
    """f(x, \\*args) with all that a solve counts on looked at, in every evaluation of one solve.

    A solver keeps values of f from step to step, and hands them to f again.  So they must have the dtype of the state
    (under autocast the state takes that of f), f must not change them, nor the data that the next evaluation reads,
    and must not fill the tensor that it returned again: that is found by its memory, and copied.

    Arguments:
        who: the caller, for errors.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._evaluations = 0
        # Of the first values, which fixed it.
        self._dtype: torch.dtype | None = None
        # The first values as f returned them: while they are held, only f itself can use their memory again.
        self._held: tuple[Tensor, ...] = ()
        self._refilled = False

    def __call__(self, f: Callable[..., Any], x: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The parts of f(x, \\*args)."""
        parts = x if isinstance(x, tuple) else (x,)
        given = {f"its argument x{f'[{i}]' if i else ''}": part for i, part in enumerate(parts)}
        given |= {f"args[{i}]": arg for i, arg in enumerate(args)}
        first = self._evaluations == 0
        self._evaluations += 1
        before = [_Mark(tensor, first) for tensor in given.values()]
        try:
            fx = f(x, *args)
        except RuntimeError as error:
            raise self._in_words(error, first, parts, args) from error
        except TypeError as error:
            if not first or _takes(f, 1 + len(args)):
                raise
            raise wrong(
                self._who, f"f to take the state and args, {1 + len(args)} in all", f"one that does not ({error})",
                "A function of the state alone, as torchdeq takes, goes to fixed_point(f, x0).",
            ) from error  # fmt: skip
        for (name, tensor), mark in zip(given.items(), before, strict=True):
            if mark.changed(tensor):
                raise wrong(self._who, f"f to leave {name} as it is", "an operation on it in place", _IN_PLACE)
        values = fx if isinstance(fx, tuple) else (fx,)
        if not all(isinstance(value, Tensor) for value in values):
            got = [type(value).__name__ for value in values]
            raise wrong(self._who, "f to return a tensor, or a tuple of them", got)
        shapes = [tuple(part.shape) for part in parts]
        if [value.shape for value in values] != shapes:
            raise wrong(
                self._who, f"f to return shape {shapes}", [tuple(value.shape) for value in values], _OTHER_SHAPE
            )
        self._check_dtype(parts[0], [value.dtype for value in values])
        return self._own(values)

    def _check_dtype(self, part: Tensor, dtypes: list[torch.dtype]) -> None:
        got = dtypes[0] if len(set(dtypes)) == 1 else dtypes
        if self._dtype is not None:
            if got != self._dtype:
                raise wrong(self._who, f"f to return {self._dtype}, as in its first evaluation", got)
            return
        cast = autocast_dtype(part.device) is not None and torch.float64 not in (part.dtype, *dtypes)
        if got != part.dtype and not (cast and len(set(dtypes)) == 1 and dtypes[0].is_floating_point):
            widest = max(dtypes, key=lambda dtype: dtype.itemsize)
            do = f"Start from x0 of {widest}" if widest.is_floating_point else "Let f compute in floating point"
            raise wrong(
                self._who, f"f to return {part.dtype}, the dtype of x0", got,
                f"{do}, or give f weights and data of {part.dtype}: no digit is added to a state, or lost, unasked.",
            )  # fmt: skip
        self._dtype = dtypes[0]

    def _own(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The values in memory that f does not write to."""
        if self._evaluations == 1:
            self._held = tuple(value.detach() for value in values)
        elif self._evaluations <= _SEEN_AFTER:
            filled = {_memory(value) for value in self._held}
            self._refilled |= any(_memory(value) in filled for value in values)
        else:
            self._held = ()
        # The first ones always: were they the next state, f would read what it writes.
        if self._evaluations == 1 or self._refilled:
            return tuple(value.clone() for value in values)
        return values

    def _in_words(
        self, error: RuntimeError, first: bool, parts: tuple[Tensor, ...], args: tuple[Tensor, ...]
    ) -> Exception:
        """What f raised; in our words where it is what a solve has brought about."""
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        if type(error) is not RuntimeError:
            return error
        if "in-place" in reason or "inplace" in reason:
            return wrong(
                self._who, "f to leave what it is given as it is", f"an operation in place ({reason})", _IN_PLACE
            )
        if first and ("shape" in reason or "size" in reason):
            shapes = [tuple(tensor.shape) for tensor in (*parts, *args)]
            return wrong(self._who, f"f to take shapes {shapes}", f"one that does not ({reason})", _OTHER_SHAPE)
        return error


class _Mark:
    """A tensor as it is, to see whether it was changed.

    Versions do not count what numpy writes to its memory, and inference tensors have none; by value they are compared
    once a solve.
    """

    def __init__(self, tensor: Tensor, first: bool) -> None:
        self._version = None if tensor.is_inference() else tensor._version
        by_value = first and tensor.layout == torch.strided and (tensor.device.type == "cpu" or self._version is None)
        self._value = tensor.detach().clone() if by_value else None

    def changed(self, tensor: Tensor) -> bool:
        if self._version is not None and tensor._version != self._version:
            return True
        if self._value is None or torch.equal(self._value, tensor):
            return False
        same = (self._value == tensor) | (self._value.isnan() & tensor.isnan())
        return not bool(same.all())


def _takes(f: Callable[..., Any], number: int) -> bool:
    """Whether f can be called with so many arguments, by its signature, if it has one."""
    f = inspect.unwrap(f)
    f = f.forward if isinstance(f, nn.Module) else f
    try:
        inspect.signature(f).bind(*range(number))
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)
    return True


def _memory(tensor: Tensor) -> int | None:
    """Where the tensor's memory begins; None where it is not in one piece."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else None
