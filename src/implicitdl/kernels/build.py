"""Compile a C source of this folder, once a machine, and load it; no compiler means no kernel, and torch instead."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from . import cache, compiler
from .compiler import BuildError

REAL = {torch.float32: ("float", "int32_t"), torch.float64: ("double", "int64_t")}


class BackendWarning(RuntimeWarning):
    """The compiled loops cannot be had, and torch's operations do their work more slowly; or nowhere to keep them.

    Said once a process, with the cause and what helps.  `implicitdl.backend()` has the same words.
    """


class Kernel(NamedTuple):
    """A compiled source.

    Attributes:
        call: the compiler and the options that it was compiled with.
        kept: the folder where it stays; None where it goes with the process.
        outside: why it is not kept.
    """

    library: ctypes.CDLL
    call: tuple[str, ...]
    kept: Path | None
    outside: BuildError | None = None


@functools.cache
def library(dtype: torch.dtype, name: str = "loops") -> ctypes.CDLL | None:
    """The compiled ``name.c`` for numbers of this dtype; None where there is none to be had.

    ``IMPLICITDL_KERNELS=0`` in the environment does without.

    Warns:
        BackendWarning: torch's operations have to serve instead, or every process compiles anew.
    """
    if dtype not in REAL or switched_off():
        return None
    kernel = find(dtype, name)
    problem = kernel if isinstance(kernel, BuildError) else kernel.outside
    if problem is not None and not _said:
        _said.append(True)
        if isinstance(kernel, Kernel):
            text = f"the loops in C are compiled anew in every process: {problem.why}. {problem.do}."
        else:
            text = f"torch's operations do the work of the loops in C, more slowly: {problem.why}. {problem.do}, or "
            text += "set IMPLICITDL_KERNELS=0 to silence this."
        warnings.warn(f"implicitdl: {text}", BackendWarning, stacklevel=2)
    return kernel.library if isinstance(kernel, Kernel) else None


_said: list[bool] = []


def switched_off() -> bool:
    return os.environ.get("IMPLICITDL_KERNELS") == "0"


@functools.cache
def find(dtype: torch.dtype, name: str = "loops") -> Kernel | BuildError:
    """The compiled ``name.c``, from the user's cache or new; or why there is none."""
    try:
        return _found(name, dtype)
    except BuildError as error:
        return error
    except OSError as error:  # a disk that fills up, a file that goes
        return BuildError(f"{name}.c could not be compiled ({error})", "See that files can be written")


def _found(name: str, dtype: torch.dtype) -> Kernel:
    source, words = Path(__file__).with_name(f"{name}.c"), compiler.command()
    calls = [(*words, *compiler.flags(*REAL[dtype], optional)) for optional in compiler.OPTIONS]
    with contextlib.suppress(BuildError):  # said below
        home = cache.folder()
        for call in calls:
            key = _key(source, call)
            for path in cache.kept(home, key):
                with contextlib.suppress(BuildError):  # of another make, or on a disk from which nothing may run
                    return Kernel(compiler.load(path, key), call, home)
    place = cache.workshop()
    if isinstance(place, BuildError):
        raise place
    folder, outside = place
    optional = compiler.known_options(words, folder)
    if isinstance(optional, BuildError):
        raise optional
    call = calls[compiler.OPTIONS.index(optional)]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        key = _key(source, call)
        made = compiler.compiled(source, call, key, Path(scratch))
        loaded = compiler.load(made, key)  # which outlives its file
        if outside is None:
            with contextlib.suppress(OSError):  # full by now
                cache.keep(folder, key, made)
    return Kernel(loaded, call, None if outside else folder, outside)


def _key(source: Path, call: tuple[str, ...]) -> str:
    """What decides the code: the texts, the compiler and how it is called, and the machine."""
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.[ch]")))]
    return cache.digest("\0".join([*texts, shutil.which(call[0]) or "", *call, _processor()]).encode())


def _processor() -> str:
    """What tells processors apart that share a home but not an instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
