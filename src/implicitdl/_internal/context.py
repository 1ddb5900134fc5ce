"""What a tensor does not say of itself: a transform of torch.func, forward mode, a graph that is being compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# torch has no public way to ask whether a transform is open.  This is the question that autograd.Function itself asks
# before every call, at the price of one call of C.
transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
# Whether a tensor stands for many under the vmap that torch.autograd has for itself, beside that of torch.func:
# of ``is_grads_batched``, of ``torch.autograd.functional.jacobian(vectorize=True)``, of gradcheck.
batched_by_autograd: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def without_grad() -> AbstractContextManager[Any]:
    """``torch.no_grad()``, which costs as much as an operation, where gradients are not off already."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


_NOTHING = nullcontext()


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, in which tensors may carry tangents."""
    return forward_ad._current_level >= 0


def plain() -> bool:
    """Whether code runs here and now, on the numbers of one call, and only torch.autograd's backward differentiates it.

    Elsewhere a tensor stands for many, or for those of later calls: its numbers cannot be looked at to check them or
    to take a shorter way, and a Function must bring more than its backward.
    """
    return not (transformed() or forward_ad._current_level >= 0 or torch.compiler.is_compiling())


def only_numbers(g: Tensor) -> bool:
    """Whether a backward pass may compute with the numbers of g alone: nobody differentiates it, and g is no batch."""
    return plain() and not torch.is_grad_enabled() and not batched_by_autograd(g)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What products are computed in here; None outside of autocast."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def has_tangent(x: Tensor) -> bool:
    """Whether x is a dual number of the level that is open."""
    return in_forward_mode() and forward_ad.unpack_dual(x).tangent is not None


def require_constant(x: Tensor, refusal: Exception) -> None:
    """Raise ``refusal`` if any transform, or any kind of differentiation, reaches x."""
    _Constant.apply(x, refusal)


class _Constant(torch.autograd.Function):
    """A Function is told of everything that is done to its input, level by level; nothing else in torch is."""

    @staticmethod
    def forward(x: Tensor, refusal: Exception) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.refusal = inputs[1]
        if ctx.needs_input_grad[0]:
            raise ctx.refusal

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise ctx.refusal

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, refusal: Exception) -> Any:
        raise refusal


_eager: dict[Callable[..., Any], Callable[..., Any]] = {}


def outside_graphs(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, to be called and not traced by torch.compile.

    Asked for at the first compilation and kept, since ``torch.compiler.disable`` imports the compiler.
    """
    if f not in _eager:
        _eager[f] = torch.compiler.disable(f)
    return _eager[f]
