"""What a StateSpace may be made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks
from .._checks import wrong
from ..activations import Activation
from .blocks import Block
from .matrices import is_sparse

if TYPE_CHECKING:
    from .space import StateSpace

WHO = "StateSpace"


def blocks_given(given: Activation | Sequence[tuple[Activation, int]], n: int) -> tuple[Block, ...]:
    if isinstance(given, Activation):
        return (Block(given, n),) if n else ()
    blocks = tuple(Block(*pair) for pair in given)
    for activation, size in blocks:
        if not isinstance(activation, Activation):
            raise wrong(WHO, "blocks of pairs (Activation, size)", repr(activation))
        _checks.positive_int(WHO, "the size of a block", size)
    total = sum(block.size for block in blocks)
    if total != n:
        raise wrong(WHO, f"blocks whose sizes add up to n={n}", f"{[block.size for block in blocks]}, {total} in all")
    return blocks


def check_finite(who: str, space: StateSpace) -> None:
    """Refuse matrices and biases with entries that are not finite."""
    for name in ("A", "B", "C", "D", "b_x", "b_y"):
        tensor = getattr(space, name)
        _checks.finite(who, name, tensor.values() if is_sparse(tensor) else tensor, _checks.DIVERGED)


def check_form(space: StateSpace) -> None:
    n, p, q = space.n, space.p, space.q
    shapes = {"A": (n, n), "B": (n, p), "C": (q, n), "D": (q, p), "b_x": (n,), "b_y": (q,)}
    for name, shape in shapes.items():
        tensor = getattr(space, name)
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise wrong(WHO, f"{name} of shape {shape} with n={n}, p={p}, q={q}", got)
        if (tensor.dtype, tensor.device) != (space.dtype, space.device):
            raise wrong(WHO, f"{name} like A, {space.dtype} on {space.device}", f"{tensor.dtype} on {tensor.device}")
        if is_sparse(tensor) != (space.is_sparse and len(shape) == 2):
            raise wrong(
                WHO, "matrices that are all dense, or all sparse beside dense biases",
                f"{name} {'sparse' if is_sparse(tensor) else 'dense'}", "Build it dense and call to_sparse().",
            )  # fmt: skip
