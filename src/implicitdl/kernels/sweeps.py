"""The door of ``sweeps.c``: x = φ(xAᵀ + b) by Picard with Aitken steps, each row to its own tolerance, in one call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .build import library

RELU, LEAKY_RELU, IDENTITY, HARDTANH, SLOPE = range(5)
SLOW, DONE, STRANGE = range(3)


class _Problem(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_ssize_t) for name in ("n", "batch", "row", "column")]
        + [
            (name, ctypes.c_void_p)
            for name in ("A", "b", "x0", "slope", "packed", "x", "z", "residual", "steps", "status")
        ]
        + [(name, ctypes.c_double) for name in ("rtol", "atol", "smallest", "longest", "fast")]
        + [(name, ctypes.c_int32) for name in ("phi", "budget", "period", "patience", "threads")]
    )


@dataclass(frozen=True)
class Swept:
    """What the loop made of every row.

    Attributes:
        x: (batch, n) the solution where ``status`` is DONE; where it is SLOW, f of the best point; else of no use.
        z: (batch, n) xAᵀ + b where the row is done.
        residual, steps, status: (batch,)
        unsolved: how many rows are not done.
    """

    x: Tensor
    z: Tensor
    residual: Tensor
    steps: Tensor
    status: Tensor
    unsolved: int


def sweeps(
    A: Tensor, b: Tensor, x0: Tensor, phi: int, slope: Tensor | None, *,
    rtol: float, atol: float, budget: int, period: int, fast: float, patience: int,
) -> Swept | None:  # fmt: skip
    """Iterate every row until it is done or has to be left to another method; None where the loop cannot serve.

    Arguments:
        A: (n, n), of any strides.
        b, x0: (batch, n).
        phi: which φ; with SLOPE, the map is x ↦ b + (x ∘ slope)Aᵀ.
        rtol, atol: of ‖f(x) − x‖₂ ≤ atol + rtol ‖f(x)‖₂.
        budget: most evaluations of f for a row.
        period: sweeps from one Aitken step to the next.
        fast: the rate per sweep at which nothing is slow.
        patience: how many more sweeps a slower row may take by its measured rate.
    """
    dtype = b.dtype
    if b.device.type != "cpu" or A.dtype != dtype or x0.dtype != dtype or torch.is_grad_enabled():
        return None
    compiled = library("sweeps", dtype)
    if compiled is None:
        return None
    batch, n = b.shape
    b, x0 = b.contiguous(), x0.contiguous()
    slope = None if slope is None else slope.contiguous()
    info = _LIMITS[dtype]
    x, z, residual = torch.empty_like(b), torch.empty_like(b), torch.empty(batch, dtype=dtype)
    steps, status = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.uint8)
    packed = torch.empty(n * (n + _VECTOR), dtype=dtype)
    problem = _Problem(
        n, batch, A.stride(0), A.stride(1), A.data_ptr(), b.data_ptr(), x0.data_ptr(),
        None if slope is None else slope.data_ptr(), packed.data_ptr(), x.data_ptr(), z.data_ptr(),
        residual.data_ptr(), steps.data_ptr(), status.data_ptr(), rtol, atol, *info, fast,
        phi, budget, period, patience, threads(batch * n * n),
    )  # fmt: skip
    unsolved = compiled.solve(ctypes.byref(problem))
    return None if unsolved < 0 else Swept(x, z, residual, steps, status, unsolved)


# Numbers in the longest vector that any processor has.
_VECTOR = 16
# A sweep of fewer products is over before a second thread has woken up.
_WORTH_A_THREAD = 1 << 16
# Norms from the first figure on have squares that are neither zero nor without digits; the second is eps^-½.
_LIMITS = {
    dtype: (float(np.sqrt(info.tiny) / info.eps), float(info.eps**-0.5))
    for dtype, info in ((d, torch.finfo(d)) for d in (torch.float32, torch.float64))
}


def threads(work: int) -> int:
    return min(torch.get_num_threads(), max(1, work // _WORTH_A_THREAD))
