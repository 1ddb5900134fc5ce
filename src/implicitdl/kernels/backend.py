"""Which way the inner loops go on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..activations import COMPILED
from .build import REAL, BuildError, Kernel, find, switched_off


@dataclass(frozen=True)
class Backend:
    """What `backend` says; it prints as a table.

    Attributes:
        way: "compiled", the loops in C; or "torch", its operations.
        why: what decided.
        compiler: the program that compiled them; None where none did.
        flags: the options that it was given.
        cache: the folder where they are kept; None where they are not.
        dtypes: of the numbers for which there are loops in C.
        activations: by name, those whose equilibria one loop solves whole, the adjoint's likewise.
        solvers: by name, those with steps in C, of any map.
    """

    way: Literal["compiled", "torch"]
    why: str
    compiler: str | None = None
    flags: tuple[str, ...] = ()
    cache: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    activations: tuple[str, ...] = ()
    solvers: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            ("way", f"{self.way}: {self.why}"),
            ("compiler", " ".join((self.compiler, *self.flags)) if self.compiler else "none"),
            ("cache", self.cache or "none"),
            ("dtypes", ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes) or "none"),
            ("activations", ", ".join(self.activations) or "none"),
            ("solvers", ", ".join(self.solvers) or "none"),
        ]
        return "\n".join(f"{name:<12} {text}" for name, text in rows)


def backend() -> Backend:
    """Whether this process solves by the loops in C or by torch's operations, and why.

    It is decided once a process, for dense tensors on the CPU, and looked up here if no solve has done so: the first
    call on a machine compiles for some seconds.  Elsewhere, and for what is not in the lists, it is torch's operations
    always; so it is under a mode that listens to them, such as a tracer.

    Returns:
        The way, the cause, and what there is in C.

    Example:
        >>> import implicitdl
        >>> found = implicitdl.backend()
        >>> found.way in ("compiled", "torch")
        True
    """
    if switched_off():
        return Backend("torch", "IMPLICITDL_KERNELS=0 is set")
    found = {dtype: find(dtype) for dtype in REAL}
    kernels = {dtype: kernel for dtype, kernel in found.items() if isinstance(kernel, Kernel)}
    problem = next((loop for loop in found.values() if isinstance(loop, BuildError)), None)
    dtypes = tuple(kernels)
    if not dtypes:
        assert problem is not None
        return Backend("torch", f"{problem.why}. {problem.do}.")
    kernel = kernels[dtypes[0]]
    outside = kernel.outside
    why = f"compiled anew in every process, since {outside.why}. {outside.do}." if outside else "the loops are in place"
    if problem is not None:
        why += f"; not all of them: {problem.why}"
    return Backend(
        "compiled", why, kernel.call[0], kernel.call[1:], str(kernel.kept) if kernel.kept else None, dtypes,
        tuple(phi.name for phi in COMPILED), ("Auto", "Aitken", "Anderson"),
    )  # fmt: skip
