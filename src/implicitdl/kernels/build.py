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
from torch import Tensor, nn

log = logging.getLogger(__name__)

_REAL = {torch.float32: ("float", "int32_t"), torch.float64: ("double", "int64_t")}
_DENSE = (Tensor, nn.Parameter)
# The best first.  Apple's compiler comes without OpenMP, and some compilers know no native processor.
_OPTIONAL: tuple[tuple[str, ...], ...] = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())

# Fewer products are made before a second thread has woken up.
_WORTH_A_THREAD = 1 << 16


def threads(work: int, parts: int | None = None) -> int:
    """How many are worth having for so many multiplications, in so many parts, of those that torch may use."""
    worth = work // _WORTH_A_THREAD if parts is None else min(work // _WORTH_A_THREAD, parts)
    return 1 if _forked else max(1, min(torch.get_num_threads(), worth))


# Threads do not outlive a fork, but OpenMP would wait for them for ever.
_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def reachable(*tensors: Tensor) -> bool:
    """Whether all numbers lie in this machine's memory, in one precision, and nobody listens to what is done."""
    dtype = tensors[0].dtype
    # A tracer and a mode of dispatch see torch's operations only, and would take the results for constants.
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return all(x.dtype is dtype and _is_dense(x) for x in tensors)


def _is_dense(x: Tensor) -> bool:
    """Whether x has the numbers that it shows at its own address, by its own strides."""
    return (
        type(x) in _DENSE
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_nested
        and not x.is_neg()  # the imaginary part of a conjugate, with the other sign in memory
        and torch._C._has_storage(x)  # torch.func's wrappers have none
        and (x.data_ptr() != 0 or x.numel() == 0)  # torch's own zeros, and storage that was given back
    )


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def library(name: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled ``name.c`` for numbers of this dtype; None where there is none to be had.

    ``IMPLICITDL_KERNELS=0`` in the environment does without.  Why one is missing goes to the log.
    """
    if os.environ.get("IMPLICITDL_KERNELS") == "0" or dtype not in _REAL:
        return None
    compiler = (os.environ.get("CC") or "cc").split()
    if not compiler or shutil.which(compiler[0]) is None:
        log.info("%s: no C compiler was found; torch's operations are used", name)
        return None
    source = Path(__file__).with_name(f"{name}.c")
    real, integer = _REAL[dtype]
    always = ["-std=gnu11", "-O3", "-fPIC", "-shared", f"-DREAL={real}", f"-DINT={integer}"]
    for optional in _OPTIONAL:
        try:
            return ctypes.CDLL(str(_compiled(source, [*compiler, *always, *optional])))
        except (OSError, subprocess.CalledProcessError) as error:
            log.info("%s was not compiled: %s", name, getattr(error, "stderr", None) or error)
    return None


def _compiled(source: Path, command: list[str]) -> Path:
    """The library of this source, command and machine, from the user's cache or new.

    Its name holds a digest of what it was written with: to load half a file ends the process with a bus error.
    """
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    key = _digest("\0".join([*texts, shutil.which(command[0]) or "", *command, _processor()]).encode())
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "implicitdl"
        folder.mkdir(parents=True, exist_ok=True)
        for found in folder.glob(f"{key}-*.so"):
            if found.stem == f"{key}-{_digest(found.read_bytes())}":
                return found
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: once a process, and gone with it
        folder = _private_folder()
        scratch = tempfile.TemporaryDirectory(dir=folder)
    with scratch as name:
        output = Path(name, "kernel.so")
        to_link = [str(source), "-o", str(output), "-lm"]
        subprocess.run([*command, *to_link], check=True, capture_output=True, text=True, errors="replace")
        compiled = folder / f"{key}-{_digest(output.read_bytes())}.so"
        os.replace(output, compiled)  # whole, or not at all, when two processes compile at once
    return compiled


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


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
