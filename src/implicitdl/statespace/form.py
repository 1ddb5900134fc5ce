"""What a StateSpace may be made of, and how it holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._internal import errors
from .._internal.errors import ArgumentError, wrong
from ..activations import Activation
from .blocks import Block
from .matrices import is_sparse, normalized

if TYPE_CHECKING:
    from .space import StateSpace

WHO = "StateSpace"


class ImmutableError(ArgumentError, AttributeError):
    """Something of a StateSpace was to be set."""


class Held:
    """A tensor of a StateSpace, read where it is known to be as it was."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, space: StateSpace | None, owner: type) -> Tensor:
        return self if space is None else space._unchanged()[self.name]  # type: ignore[return-value]


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; it shares the number with its views.  None where torch keeps none."""
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else None


def copied(given: Any) -> Any:
    """A copy of a tensor; what is none is left for `check_form` to refuse."""
    return normalized(given).clone() if isinstance(given, Tensor) else given


def well_formed(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """A, B, C and D, dense or coalesced."""
    for name in "ABCD":
        M = given[name]
        if not isinstance(M, Tensor) or M.dim() != 2 or not M.is_floating_point():
            got: object = (tuple(M.shape), M.dtype) if isinstance(M, Tensor) else type(M).__name__
            raise wrong(WHO, f"{name} to be a floating-point matrix", got)
    return {name: normalized(given[name]) for name in "ABCD"}


def blocks_given(given: Activation | Sequence[tuple[Activation, int]], n: int) -> tuple[Block, ...]:
    if isinstance(given, Activation):
        return (Block(given, n),) if n else ()
    blocks = tuple(Block(*pair) for pair in given)
    for activation, size in blocks:
        if not isinstance(activation, Activation):
            raise wrong(WHO, "blocks of pairs (Activation, size)", repr(activation))
        errors.positive_int(WHO, "the size of a block", size)
    total = sum(block.size for block in blocks)
    if total != n:
        raise wrong(WHO, f"blocks whose sizes add up to n={n}", f"{[block.size for block in blocks]}, {total} in all")
    return blocks


def check_finite(who: str, space: StateSpace) -> None:
    """Refuse matrices and biases with entries that are not finite."""
    for name in ("A", "B", "C", "D", "b_x", "b_y"):
        tensor = getattr(space, name)
        errors.finite(who, name, tensor.values() if is_sparse(tensor) else tensor, errors.DIVERGED)


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
