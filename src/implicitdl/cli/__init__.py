"""The command line `implicitdl`: train, evaluate, plot, certify, info, sim."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .._internal.errors import ArgumentError, MissingExtraError, extra
from ..solution import ConvergenceError, ImplicitFunctionWarning

_BAD_INPUT, _INTERRUPTED = 2, 130
# How torch words, on a CPU and on a GPU, that there is no room for a tensor.
_TOO_LARGE = ("allocate memory", "out of memory", "Storage size calculation overflowed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Arguments:
        arguments: the words after `implicitdl`; those of the process by default.

    Returns:
        The exit code: 0, or 2 after one line about bad input on stderr, or 130 after an interrupt. Any other
        failure is a bug, and its traceback is shown.

    Example:
        >>> from implicitdl.cli import main
        >>> main(["--version"])
        implicitdl 0.1.0
        0
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # ‖A‖∞ must not be the end of a run on a console without it
            stream.reconfigure(errors="replace")
    try:
        for module in ("typer", "rich"):
            extra(module, "cli")
        from .app import UsageError, command
        from .options import RunInterruptedError
    except MissingExtraError as error:
        return _say(error, _BAD_INPUT)
    with warnings.catch_warnings():
        _show_once(ImplicitFunctionWarning)
        try:
            code = command.main(args=words or ["--help"], prog_name="implicitdl", standalone_mode=False)
        except UsageError as error:
            return _say(error.format_message(), _BAD_INPUT)
        except RunInterruptedError as error:
            return _say(error, _INTERRUPTED)
        except (ArgumentError, MissingExtraError, OSError, ConvergenceError) as error:
            return _say(error, _BAD_INPUT)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TOO_LARGE):
                raise
            return _say(f"not enough memory for sizes such as these ({error})", _BAD_INPUT)
    if code == _INTERRUPTED:
        return _say("interrupted", _INTERRUPTED)
    return int(code or 0)


def _say(what: object, code: int) -> int:
    print("implicitdl:", " ".join(str(what).split()), file=sys.stderr)
    return code


def _show_once(category: type[Warning]) -> None:
    """A category as one line, the first time; until the surrounding catch_warnings ends."""
    others: Any = warnings.showwarning
    shown: list[object] = []

    def show(message: Any, kind: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(kind, category):
            others(message, kind, *where, **more)
        elif not shown:
            shown.append(message)
            _say(f"warning: {message}", 0)

    warnings.simplefilter("always", category)
    warnings.showwarning = show  # type: ignore[assignment]
