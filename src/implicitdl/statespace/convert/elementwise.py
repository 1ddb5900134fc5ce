"""The rules of what acts entry by entry: activations, which become states, and arithmetic with constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import ELU, GELU, HARDTANH, LEAKY_RELU, RELU, TANH, Activation, LeakySlope
from .affine import Affine, NoFormError

Value = Affine | Tensor | float


def activation(record: Activation) -> Callable[..., Affine]:
    def rule(input: Affine, inplace: bool = False) -> Affine:
        return input.activated(record)

    return rule


def leaky_relu(input: Affine, negative_slope: float = 0.01, inplace: bool = False) -> Affine:
    return input.activated(_leaky(negative_slope))


def hardtanh(input: Affine, min_val: float | None = -1.0, max_val: float | None = 1.0, inplace: bool = False) -> Affine:
    """m + r·hardtanh((z − m)/r), with the interval's middle m and half length r; by ReLU when it has one end."""
    min_val, max_val = _bound(min_val), _bound(max_val)
    if min_val is not None and max_val is not None:
        if not bool(torch.as_tensor(min_val < max_val, device="cpu").all()):
            return hardtanh(hardtanh(input, min_val, None), None, max_val)
        m, r = (max_val + min_val) / 2, (max_val - min_val) / 2
        return add(mul(mul(add(input, -m), 1 / r).activated(HARDTANH), r), m)
    sign, end = (1.0, min_val) if max_val is None else (-1.0, max_val)
    if end is None:
        raise NoFormError("it has no bounds. Give one")
    return add(mul(mul(sub(input, end), sign).activated(RELU), sign), end)


def clamp_min(input: Affine, min: Any) -> Affine:
    return hardtanh(input, min, None)


def clamp_max(input: Affine, max: Any) -> Affine:
    return hardtanh(input, None, max)


def prelu(input: Affine, weight: Tensor) -> Affine:
    """az + (1 − a) relu(z), with one slope a, or one for each channel."""
    a = weight if weight.numel() == 1 else weight.reshape(-1, *[1] * (len(input.features) - 1))
    return add(mul(input, a), mul(input.activated(RELU), 1 - a))


def rrelu(
    input: Affine,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Affine:
    if training:
        raise NoFormError("its slopes are random in training mode. Call eval() first")
    return leaky_relu(input, (lower + upper) / 2)


def absolute(input: Affine) -> Affine:
    """|z| = 2 relu(z) − z."""
    return sub(mul(input.activated(RELU), 2.0), input)


def maximum(input: Value, other: Value) -> Affine:
    """b + relu(a − b)."""
    return add(sub(input, other).activated(RELU), other)


def minimum(input: Value, other: Value) -> Affine:
    """a − relu(a − b)."""
    return sub(input, sub(input, other).activated(RELU))


def hardsigmoid(input: Affine, inplace: bool = False) -> Affine:
    return div(hardtanh(add(input, 3.0), 0.0, 6.0), 6.0)


def softshrink(input: Affine, lambd: float = 0.5) -> Affine:
    """z minus its part between −λ and λ."""
    return sub(input, hardtanh(input, -lambd, lambd)) if lambd else input


def tanhshrink(input: Affine) -> Affine:
    return sub(input, input.activated(TANH))


def copy(input: Affine, src: Value, non_blocking: bool = False) -> Affine:
    return add(mul(input, 0.0), src)


def zero(input: Affine) -> Affine:
    return mul(input, 0.0)


def relu6(input: Affine, inplace: bool = False) -> Affine:
    return hardtanh(input, 0.0, 6.0)


def _bound(end: Any) -> Any:
    """An end of an interval; None where there is none."""
    return None if isinstance(end, float) and math.isinf(end) else end


def clamp(input: Affine, min: Any = None, max: Any = None) -> Affine:
    return hardtanh(input, min, max)


def elu(input: Affine, alpha: float = 1.0, inplace: bool = False) -> Affine:
    return _default(input, ELU, alpha=alpha == 1.0)


# As torch computes it: above its threshold of 20 it is the identity, 2e-9 below log(1 + eᶻ).
_SOFTPLUS = Activation("softplus(threshold=20)", F.softplus, torch.sigmoid, (0.0, 1.0))


def softplus(input: Affine, beta: float = 1, threshold: float = 20) -> Affine:
    return _default(input, _SOFTPLUS, beta=beta == 1, threshold=threshold == 20)


def gelu(input: Affine, approximate: str = "none") -> Affine:
    return _default(input, GELU, approximate=approximate == "none")


def _default(value: Affine, record: Activation, **kept: bool) -> Affine:
    for name, default in kept.items():
        if not default:
            raise NoFormError(f"{record.name} is known with torch's default {name} only. Leave it at that")
    return value.activated(record)


@cache
def _leaky(slope: float) -> Activation:
    if slope == 0.01:  # torch's default, and the record's
        return LEAKY_RELU
    phi = partial(F.leaky_relu, negative_slope=slope)
    ends = (min(slope, 1.0), max(slope, 1.0))
    return Activation(f"leaky_relu({slope:g})", phi, LeakySlope(slope), ends, homogeneous=True)


def add(input: Value, other: Value, alpha: float = 1) -> Affine:
    if not isinstance(input, Affine):
        assert isinstance(other, Affine)
        input, other, alpha = mul(other, alpha), input, 1
    if isinstance(other, Affine):
        shape = torch.broadcast_shapes(input.shape, other.shape)
        return _expanded(input, shape).plus(_expanded(other, shape), alpha)
    value, constant = _with_constant(input, other)
    return value.shifted(alpha * constant)


def sub(input: Value, other: Value, alpha: float = 1) -> Affine:
    return add(input, other, -alpha)


def rsub(input: Value, other: Value, alpha: float = 1) -> Affine:
    return sub(other, input, alpha)


def mul(input: Value, other: Value) -> Affine:
    if isinstance(input, Affine) and isinstance(other, Affine):
        raise NoFormError("a product of two values that depend on the input is not affine. Leave it out")
    if not isinstance(input, Affine):
        return mul(other, input)
    assert not isinstance(other, Affine)
    value, factors = _with_constant(input, other)
    return value.scaled(factors)


def div(input: Value, other: Value) -> Affine:
    if isinstance(other, Affine):
        raise NoFormError("a quotient by a value that depends on the input is not affine. Leave it out")
    assert isinstance(input, Affine)
    return mul(input, 1 / _constant(input, other))


def neg(input: Affine) -> Affine:
    return mul(input, -1.0)


def batch_norm(
    input: Affine,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Affine:
    """s(v − μ) + β with s = γ/√(σ² + ε), by channel."""
    if running_mean is None or running_var is None:
        raise NoFormError(
            "BatchNorm without running statistics divides by those of the batch. Build it with track_running_stats=True"
        )
    if training:
        raise NoFormError("BatchNorm divides by statistics of the batch, which mix the samples. Call eval() first")
    s = (running_var + eps).rsqrt() if weight is None else weight * (running_var + eps).rsqrt()
    shift = -running_mean * s if bias is None else bias - running_mean * s
    each = (-1, *[1] * (len(input.features) - 1))
    return add(mul(input, s.reshape(each)), shift.reshape(each))


def instance_norm(
    input: Affine,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Affine:
    """With running statistics, BatchNorm's rule."""
    if use_input_stats:
        raise NoFormError(
            "it divides by statistics of its own input. Build it with track_running_stats=True, and call eval()"
        )
    return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _constant(value: Affine, constant: Tensor | float) -> Tensor:
    """In the value's dtype from the start: torch's default dtype would round a number."""
    return torch.as_tensor(constant, dtype=value.dtype, device=value.device)


def _with_constant(value: Affine, constant: Tensor | float) -> tuple[Affine, Tensor]:
    """Both at the shape that they broadcast to, the constant flattened for one sample."""
    given = _constant(value, constant)
    shape = torch.broadcast_shapes(value.shape, given.shape)
    value = _expanded(value, shape)
    return value, value.net.sample(given.expand(shape)).reshape(-1)


def _expanded(value: Affine, shape: torch.Size) -> Affine:
    return value if value.shape == shape else value.moved(value.numbers().expand(shape))
