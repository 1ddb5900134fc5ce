"""The C compiler of this machine: which it is, the options that it knows, and calls of it that end."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

# Seconds that a compiler may take for a file, which takes one or two.
_PATIENCE = 60.0
_USUAL = ("cc", "gcc", "clang")
_ALWAYS = ("-std=gnu11", "-O3", "-fPIC", "-shared")
# The best first.  Apple's compiler comes without OpenMP, and some compilers know no native processor.
OPTIONS: tuple[tuple[str, ...], ...] = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())

_PROBE = Path(__file__).with_name("probe.c")


class BuildError(Exception):
    """Why a compiled loop cannot be had, and what would help, in words."""

    def __init__(self, why: str, do: str) -> None:
        super().__init__(why)
        self.why, self.do = why, do


class HangsError(BuildError):
    """The compiler did not end."""


def command() -> tuple[str, ...]:
    """The user's CC, or the first usual compiler that is there.

    Raises:
        BuildError: there is none.
    """
    asked = os.environ.get("CC", "").strip()
    if not asked:
        usual = next(filter(shutil.which, _USUAL), None)
        if usual is None:
            raise BuildError("no C compiler was found", "Install gcc or clang")
        return (usual,)
    with contextlib.suppress(ValueError):  # a quotation without an end
        words = shlex.split(asked)
        if shutil.which(words[0]):
            return tuple(words)
    raise BuildError(f"CC={asked} names no program", "Set CC to a C compiler")


def flags(real: str, integer: str, optional: tuple[str, ...]) -> tuple[str, ...]:
    return (*_ALWAYS, f"-DREAL={real}", f"-DINT={integer}", *optional)


@functools.cache
def known_options(words: tuple[str, ...], folder: Path) -> tuple[str, ...] | BuildError:
    """The best options that a compiler knows, by a file of a few lines: those of the loops take seconds to fail."""
    reason: BuildError | None = None
    for optional in OPTIONS:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            try:
                load(compiled(_PROBE, (*words, *flags("float", "int32_t", optional)), "probe", Path(scratch)), "probe")
                return optional
            except HangsError as error:
                return error
            except BuildError as error:
                reason = error
    assert reason is not None
    return reason


def compiled(source: Path, call: tuple[str, ...], stamp: str, folder: Path) -> Path:
    """The library of one source, in this folder, which also holds what is written on the way.

    Raises:
        BuildError: the compiler fails, or does not end.
    """
    if call[0] in _hung:
        raise _hung[call[0]]
    output = folder / "kernel.so"
    try:
        # In a session of its own it has no terminal to ask on, and ends with all that it has started.
        process = subprocess.Popen(
            [*call, f"-DSTAMP={stamp}", str(source), "-o", str(output), "-lm"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(folder)}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise BuildError(f"{call[0]} cannot be run ({error.strerror})", "Set CC to a C compiler") from error
    with process:
        try:
            _, said = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired as error:
            why = f"the compiler {call[0]} did not end within {_PATIENCE:g} seconds"
            _hung[call[0]] = HangsError(why, "Set CC to one that does")
            raise _hung[call[0]] from error
        finally:
            if process.returncode is None:
                _kill(process)
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or ["without a word"]
        line = next((line for line in lines if "error" in line), lines[-1])
        raise BuildError(f"the compiler {call[0]} failed ({line[:200]})", "Install gcc or clang")
    return output


_hung: dict[str, HangsError] = {}  # those that are not waited for again


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def load(path: Path, stamp: str) -> ctypes.CDLL:
    """The library in this file, if it says that it was made under this stamp.

    Raises:
        BuildError: it cannot be loaded, or is another one.
    """
    try:
        library = ctypes.CDLL(str(path))
        found = (ctypes.c_char * len(stamp)).in_dll(library, "stamp").value
    except (OSError, ValueError) as error:
        raise BuildError(
            f"what was compiled cannot be loaded ({error})", "Set CC to a compiler for this machine"
        ) from error
    if found != stamp.encode():
        raise BuildError("what was compiled is another library", "Set CC to a C compiler")
    return library
