"""A pytest plugin: matrix products whose last bits depend on how many rows they have, as on other processors.

MKL, OpenBLAS, oneDNN and cuBLAS choose by the shapes in which order they sum, so that ``(x @ A.T)[i]`` is another number
in another batch.  With ``PYTHONPATH=tests pytest -p other_blas`` every product is moved by one rounding of its terms, up
or down by place and shape: a test that passes so asks for no bits that products do not have.

A mode of dispatch switches the compiled loops and ``torch.compile`` off; conftest.py skips their tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "addmv_", "dot", "vdot", "convolution")
_PRODUCTS = {getattr(torch.ops.aten, name) for name in _NAMES}


class OtherBlas(TorchDispatchMode):
    """Sums of products, as rounded elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # matmul and linear arrive whole in inference mode
                return func.decompose(*args, **kwargs)
        if func.overloadpacket not in _PRODUCTS:
            return func(*args, **kwargs)
        positive = [arg.abs() if isinstance(arg, Tensor) else arg for arg in args]
        factors = {name: abs(factor) for name, factor in kwargs.items() if name in ("alpha", "beta")}
        terms = func.overloadpacket(*positive, **factors)
        out = func(*args, **kwargs)
        if out.layout is torch.strided and (out.is_floating_point() or out.is_complex()):
            sign = (torch.arange(out.numel(), device=out.device) + sum(out.shape)) % 3 - 1
            moved = terms * (torch.finfo(out.dtype).eps * sign.view(out.shape))
            out.add_(moved.nan_to_num(0.0, 0.0, 0.0))
        return out


@pytest.fixture(autouse=True)
def other_blas() -> Iterator[None]:
    with OtherBlas():
        yield
