"""Compile a C source of this folder, once a machine, and load it; no compiler means no kernel, and torch instead."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_REAL = {torch.float32: ("float", "int32_t"), torch.float64: ("double", "int64_t")}
# Without OpenMP the loop is still worth having, in one thread; Apple's compiler comes without.
_THREADING = (["-fopenmp"], [])


@functools.cache
def library(name: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled ``name.c`` for numbers of this dtype; None where there is none to be had.

    ``IMPLICITDL_KERNELS=0`` in the environment does without.  Why one is missing goes to the log.
    """
    if os.environ.get("IMPLICITDL_KERNELS") == "0" or dtype not in _REAL:
        return None
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        log.info("%s: no C compiler was found; torch's operations are used", name)
        return None
    source = Path(__file__).with_name(f"{name}.c").read_text(encoding="utf-8")
    for threading in _THREADING:
        real, integer = _REAL[dtype]
        flags = ["-O3", "-march=native", "-fPIC", "-shared", *threading, f"-DREAL={real}", f"-DINT={integer}"]
        try:
            return ctypes.CDLL(str(_compiled(source, [compiler, *flags])))
        except (OSError, subprocess.CalledProcessError) as error:
            log.info("%s was not compiled: %s", name, getattr(error, "stderr", None) or error)
    return None


def _compiled(source: str, command: list[str]) -> Path:
    """The library of this source, command and machine, from the user's cache or new."""
    key = hashlib.sha256("\0".join([source, *command, _processor()]).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "implicitdl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = folder / f"{key}.so"
        if found.exists():
            return found
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError:  # a home that cannot be written: once a process, and gone with it
        folder = _private_folder()
        found, scratch = folder / f"{key}.so", tempfile.TemporaryDirectory(dir=folder)
    with scratch as name:
        text, output = Path(name, "kernel.c"), Path(name, "kernel.so")
        text.write_text(source, encoding="utf-8")
        subprocess.run([*command, str(text), "-o", str(output), "-lm"], check=True, capture_output=True, text=True)
        os.replace(output, found)  # whole, or not at all, when two processes compile at once
    return found


@functools.cache
def _private_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="implicitdl-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _processor() -> str:
    """What tells processors apart that share a home but not an instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
