"""What becomes of each of torch's operations; the name is the function's or the method's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...activations import RELU, SIGMOID, SILU, TANH
from . import elementwise, linear, moves, pooling, recurrence
from .affine import Affine, NoFormError

MOVES = (
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "movedim", "chunk",
    "split", "narrow", "select", "unbind", "flip", "roll", "expand", "index_select", "contiguous", "repeat",
)  # fmt: skip


def new_zeros(input: Affine, *size: Any) -> Tensor:  # noqa: A002
    return input.net.like.new_zeros(*size)


def matmul(input: Affine, other: Tensor) -> Affine:  # noqa: A002 (torch's name)
    """By a constant matrix from the right."""
    if not isinstance(input, Affine) or isinstance(other, Affine) or other.dim() != 2:
        raise NoFormError("a matrix product is affine with a constant matrix on its right only. Leave it out")
    return linear.linear(input, other.t())


RULES: dict[str, Callable[..., Any]] = {
    "relu": elementwise.activation(RELU),
    "tanh": elementwise.activation(TANH),
    "sigmoid": elementwise.activation(SIGMOID),
    "silu": elementwise.activation(SILU),
    "relu6": elementwise.relu6,
    "leaky_relu": elementwise.leaky_relu,
    "hardtanh": elementwise.hardtanh,
    "clamp": elementwise.clamp,
    "elu": elementwise.elu,
    "softplus": elementwise.softplus,
    "gelu": elementwise.gelu,
    "add": elementwise.add,
    "sub": elementwise.sub,
    "rsub": elementwise.rsub,
    "mul": elementwise.mul,
    "div": elementwise.div,
    "neg": elementwise.neg,
    "batch_norm": elementwise.batch_norm,
    "linear": linear.linear,
    "matmul": matmul,
    "conv1d": linear.conv(1),
    "conv2d": linear.conv(2),
    "avg_pool1d": linear.avg_pool(1),
    "avg_pool2d": linear.avg_pool(2),
    "adaptive_avg_pool1d": linear.adaptive_avg_pool(1),
    "adaptive_avg_pool2d": linear.adaptive_avg_pool(2),
    "max_pool1d": pooling.max_pool(1),
    "max_pool2d": pooling.max_pool(2),
    "getitem": moves.move("__getitem__"),
    "new_zeros": new_zeros,
    "cat": moves.cat,
    "stack": moves.stack,
    "pad": moves.pad,
    "sum": moves.sum,
    "mean": moves.mean,
    "dropout": moves.dropout,
    "dropout1d": moves.dropout,
    "dropout2d": moves.dropout,
    "alpha_dropout": moves.dropout,
    "clone": moves.identity,
    "rnn_tanh": recurrence.rnn(TANH),
    "rnn_relu": recurrence.rnn(RELU),
    "rnn_tanh_cell": recurrence.cell(TANH),
    "rnn_relu_cell": recurrence.cell(RELU),
    **{name: moves.move(name) for name in MOVES},
}

# Other names of the same operations: those of Python's operators, and in place.
_ALIASES = {"truediv": "div", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}

# What is asked for most, with the reason why it cannot be had.
_PRODUCT = "it multiplies values that depend on the input, which is neither affine nor elementwise"
_STATISTICS = "it divides by a statistic of its own input, which is neither affine nor elementwise"
_EXPONENTIALS = "each of its outputs depends on all inputs of a sum of exponentials, which is not elementwise"
REASONS = {
    "softmax": _EXPONENTIALS,
    "log_softmax": _EXPONENTIALS,
    "logsumexp": _EXPONENTIALS,
    "layer_norm": _STATISTICS,
    "rms_norm": _STATISTICS,
    "group_norm": _STATISTICS,
    "instance_norm": _STATISTICS,
    "normalize": _STATISTICS,
    "scaled_dot_product_attention": _PRODUCT,
    "multi_head_attention_forward": _PRODUCT,
    "bmm": _PRODUCT,
    "lstm": _PRODUCT,
    "gru": _PRODUCT,
}


def no_rule(name: str) -> NoFormError:
    return NoFormError(f"{REASONS.get(name, f'there is no rule for {name}')}. Convert the parts before and after it")


def apply(name: str, *args: Any, **kwargs: Any) -> Any:
    """What the operation makes of its arguments, at least one of which is an `Affine`."""
    plain = name if name.startswith("__") else name.removesuffix("_")
    plain = _ALIASES.get(plain, plain)
    rule = RULES.get(plain)
    if rule is None:
        raise no_rule(plain)
    try:
        options = inspect.signature(rule).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise NoFormError(f"{name} is not known with these options ({error}). Leave them at their defaults") from error
    value = rule(*args, **kwargs)
    in_place = name != plain and (name.endswith("_") or name.startswith("i"))
    return args[0].become(value) if in_place or options.get("inplace") else value
