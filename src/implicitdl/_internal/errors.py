"""The only place where argument errors are worded: `<Who>: expected <what>, got <actual>. <What to do.>`"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import numbers
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .context import plain


class ArgumentError(ValueError):
    """A bad argument, in one worded sentence. The command line prints it and exits with 2."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def wrong(who: str, expected: str, got: object, do: str = "") -> ArgumentError:
    """The one form every argument error has.  Raise what this returns."""
    return ArgumentError(f"{who}: expected {expected}, got {got}.{' ' + do if do else ''}")


def real(value: Any) -> float:
    """A number of any kind, NumPy's too, as a float; NaN, which no range holds, for what is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _integer(who: str, name: str, what: str, value: Any, least: int) -> int:
    number = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else least - 1
    if number < least:
        raise wrong(who, f"{name} to be {what}", repr(value))
    if number >= 1 << 63:  # sizes and seeds of torch's
        raise wrong(who, f"{name} below 2⁶³", repr(value))
    return number


def positive_int(who: str, name: str, value: Any) -> int:
    return _integer(who, name, "a positive integer", value, 1)


def non_negative_int(who: str, name: str, value: Any) -> int:
    return _integer(who, name, "an integer ≥ 0", value, 0)


def open_unit(who: str, name: str, value: Any) -> float:
    """κ and its like: a number strictly between 0 and 1."""
    if not 0.0 < (number := real(value)) < 1.0:
        raise wrong(who, f"{name} strictly between 0 and 1", repr(value))
    return number


def non_negative(who: str, name: str, value: Any) -> float:
    if not (number := real(value)) >= 0.0:
        raise wrong(who, f"{name} ≥ 0", repr(value))
    if number == math.inf:
        raise wrong(who, f"a finite {name}", repr(value))
    return number


def positive(who: str, name: str, value: Any) -> float:
    if not 0.0 < (number := real(value)) < math.inf:
        raise wrong(who, f"{name} to be a positive finite number", repr(value))
    return number


def fraction(who: str, name: str, value: Any) -> float:
    """A share that may be nothing but never everything."""
    if not 0.0 <= (number := real(value)) < 1.0:
        raise wrong(who, f"0 ≤ {name} < 1", repr(value))
    return number


def settle(settings: Any, check: Callable[[str, str, Any], Any], *names: str) -> None:
    """Fields of a frozen dataclass, checked and kept as Python's own numbers; None stays where it is the default."""
    for name in names:
        value = getattr(settings, name)
        if value is not None or settings.__dataclass_fields__[name].default is not None:
            object.__setattr__(settings, name, check(type(settings).__name__, name, value))


def choice(who: str, name: str, value: Any, known: Any) -> Any:
    if value not in known:
        raise wrong(who, f"{name} to be one of {', '.join(map(str, known))}", repr(value))
    return value


def same_place(who: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Data must have the dtype and the device of the weights; autocast casts the dtype by itself, but never float64."""
    if tensor.device != like.device:
        raise wrong(who, f"{name} on {like.device}", tensor.device, f"Move one of them: {name}.to('{like.device}').")
    cast = torch.is_autocast_enabled(tensor.device.type) and torch.float64 not in (tensor.dtype, like.dtype)
    if tensor.dtype != like.dtype and not cast:
        raise wrong(who, f"{name} of dtype {like.dtype}", tensor.dtype, f"Cast one of them: {name}.to({like.dtype}).")


#: What to do about weights that are not finite.
DIVERGED = "Training has diverged: go back to earlier weights, with a lower learning rate or clipped gradients."


def finite(who: str, name: str, tensor: Tensor, do: str = "Clean the input first.") -> None:
    # One reduction instead of isfinite().all(): a sum is finite unless an entry is not, or it overflows,
    # and only then are the entries looked at one by one.
    if plain() and not torch.isfinite(tensor.detach().sum()) and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise wrong(
            who,
            f"finite {name}",
            f"{bad} NaN or infinite entries of {tensor.numel()}",
            do,
        )


# How mathematics is spelled where a console cannot show it.
_SPELLED = str.maketrans(
    {"‖": "||", "∞": "inf", "ε": "eps", "λ": "lambda", "φ": "phi", "κ": "kappa", "ρ": "rho", "≤": "<=", "≥": ">="}
)


def shown(text: str) -> str:
    """What a report prints, spelled in ASCII where standard output has no more."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text.translate(_SPELLED).encode("ascii", "replace").decode()
    return text


@contextlib.contextmanager
def takes(who: str, what: str, u: Tensor, do: str) -> Iterator[None]:
    """Around a call of someone else's module: what it raises is said to be about this input."""
    try:
        yield
    # What torch's operations and a module's own code raise for a shape or a dtype that they do not know.
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        shape = tuple(u.shape)
        raise wrong(who, f"{what} that takes inputs of shape {shape}", f"one that does not ({reason})", do) from error


def extra(module: str, name: str) -> ModuleType:
    """Import an optional dependency where it is used, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Of a package that is there, what is missing is a part that its version does not have.
        missing = (error.name or module).partition(".")[0]
        there = importlib.util.find_spec(missing) is not None
        what = f"this version of {missing} has no {error.name}" if there else f"{missing} is not installed"
        how = "install -U" if there else "install"
        raise MissingExtraError(f"{what}. Install it with: pip {how} 'implicitdl[{name}]'") from error
