"""What becomes of each of torch's operations; the name is the function's or the method's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ...activations import RELU, SIGMOID, SILU, TANH
from . import elementwise, linear, moves, pooling, recurrence
from .affine import Affine, NoFormError
from .read_off import Function, affine, plane_by_plane
from .read_off import moves as moves_of

# What only moves entries, where it copies; where it gives a view, torch itself says so.
MOVES = {
    "reshape", "flatten", "unflatten", "contiguous", "clone", "repeat", "tile", "repeat_interleave", "roll", "flip",
    "fliplr", "flipud", "rot90", "index_select", "getitem", "gather", "take_along_dim", "ravel", "unfold", "tril",
    "triu", "diag_embed", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
    "constant_pad_nd",
}  # fmt: skip

# What is affine in the arguments that depend on the input, where the others are constants.
AFFINE = {
    "matmul", "mm", "mv", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "inner", "bilinear", "kron", "cross",
    "lerp", "addcmul", "cumsum", "diff", "fold", "where", "masked_fill", "index_add", "scatter_add", "index_copy",
    "trapezoid",
}  # fmt: skip

# What is affine and does the same to every channel of an image.
PLANES = {
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3,
    "adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3,
    "interpolate": None, "upsample": None, "upsample_nearest": None, "upsample_bilinear": None,
}  # fmt: skip

# What makes constants of a shape, and what tells no more than shapes and kinds.
CONSTANTS = {"new_zeros", "new_ones", "new_full", "new_tensor", "zeros_like", "ones_like", "full_like"}
SHAPES = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
    "is_floating_point", "is_complex", "get_device", "type", "is_tensor", "is_signed", "is_inference", "is_pinned",
}  # fmt: skip
VIEW_ATTRIBUTES = {"T", "mT", "H", "mH"}

# Rules that have the name of the operation.
_NAMED = (
    elementwise.relu6, elementwise.leaky_relu, elementwise.prelu, elementwise.rrelu, elementwise.maximum,
    elementwise.minimum, elementwise.hardsigmoid, elementwise.softshrink, elementwise.tanhshrink,
    elementwise.hardtanh, elementwise.clamp, elementwise.clamp_min, elementwise.clamp_max, elementwise.elu,
    elementwise.softplus, elementwise.gelu, elementwise.add, elementwise.sub, elementwise.rsub, elementwise.mul,
    elementwise.div, elementwise.neg, elementwise.copy, elementwise.zero, elementwise.batch_norm,
    elementwise.instance_norm, linear.linear, moves.cat, moves.hstack, moves.stack, moves.pad, moves.sum,
    moves.mean, moves.dropout,
)  # fmt: skip

RULES: dict[str, Callable[..., Any]] = {
    **{rule.__name__: rule for rule in _NAMED},
    "relu": elementwise.activation(RELU),
    "tanh": elementwise.activation(TANH),
    "sigmoid": elementwise.activation(SIGMOID),
    "silu": elementwise.activation(SILU),
    "abs": elementwise.absolute,
    "celu": elementwise.elu,
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"), moves.dropout),
    **{f"conv{d}d": linear.conv(d) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": linear.conv_transpose(d) for d in (1, 2, 3)},
    **{f"max_pool{d}d": pooling.max_pool(d) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": pooling.adaptive_max_pool(d) for d in (1, 2, 3)},
    "rnn_tanh": recurrence.rnn(TANH),
    "rnn_relu": recurrence.rnn(RELU),
    "rnn_tanh_cell": recurrence.cell(TANH),
    "rnn_relu_cell": recurrence.cell(RELU),
}

# Other names of the same operations: those of Python's operators, and torch's own.
_ALIASES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "absolute": "abs",
    "clip": "clamp", "concat": "cat", "concatenate": "cat", "__getitem__": "getitem",
}  # fmt: skip

# What is asked for most, with the reason why it cannot be had.
_PRODUCT = "it multiplies values that depend on the input, which is neither affine nor elementwise"
_STATISTICS = "it divides by a statistic of its own input, which is neither affine nor elementwise"
_EXPONENTIALS = "each of its outputs depends on all inputs of a sum of exponentials, which is not elementwise"
REASONS = {
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp"), _EXPONENTIALS),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "normalize"), _STATISTICS),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward", "lstm", "gru"), _PRODUCT),
    "detach": "it keeps gradients from the weights before it, which the matrices would not",
}


def no_rule(name: str) -> NoFormError:
    return NoFormError(f"{REASONS.get(name, f'there is no rule for {name}')}. Convert the parts before and after it")


def rule_of(name: str, in_place: bool) -> Callable[..., Any]:
    """What the operation makes of the values of its arguments; called with torch's function and them."""
    plain = name.removesuffix("_") if in_place and not name.endswith("__") else name
    plain = _ALIASES.get(plain, plain)
    rule = RULES.get(plain)
    if rule is not None:
        return _worded(name, rule)
    if plain in PLANES:
        return _planes(PLANES[plain])
    if plain in MOVES:
        return moves_of
    if plain in AFFINE:
        return affine
    raise no_rule(plain)


def _worded(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    def known(function: Function, *args: Any, **kwargs: Any) -> Any:
        try:
            inspect.signature(rule).bind(*args, **kwargs)
        except TypeError as error:
            raise NoFormError(
                f"{name} is not known with these options ({error}). Leave them at their defaults"
            ) from error
        return rule(*args, **kwargs)

    return known


def _planes(dims: int | None) -> Callable[..., Any]:
    def rule(function: Function, input: Affine, *args: Any, **kwargs: Any) -> Affine:
        linear.image(input, len(input.features) - 1 if dims is None else dims)
        return plane_by_plane(function, input, *args, **kwargs)

    return rule
