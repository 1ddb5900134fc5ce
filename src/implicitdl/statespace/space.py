"""StateSpace: the model x = φ(Ax + Bu + b_x), y = Cx + Du + b_y as its matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .._internal import errors
from .._internal.errors import ArgumentError, wrong
from ..activations import RELU, Activation
from ..adjoints import Adjoint
from ..solution import OnFailure, Solution
from ..solvers import Solver
from .block_solve import Block, Component, joined, plan, solve_in_order
from .matrices import (
    assemble,
    block_diagonal,
    count_nonzero,
    eye,
    is_sparse,
    linear,
    normalized,
    product,
    sparse,
)

WHO = "StateSpace"
_TENSORS = ("A", "B", "C", "D", "b_x", "b_y")


class ImmutableError(ArgumentError, AttributeError):
    """An attribute of a StateSpace was to be set."""


class _Unchanged:
    """A tensor of a StateSpace, which is refused after it was written to in place."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, space: StateSpace | None, owner: type) -> Tensor:
        return self if space is None else space._unchanged()[self.name]  # type: ignore[return-value]


class StateSpace:
    """The model x = φ(Ax + Bu + b_x), y = Cx + Du + b_y, as its matrices and the φ of every block of states.

    Any network is one (its layers are blocks, A is block triangular), and models compose into models: ``m2 @ m1``,
    ``m1 + m2``, ``a * m`` and the functions of `implicitdl.statespace`.  A call solves for x in the order of the
    blocks: blocks without a loop cost one pass, blocks that loop are solved as an equilibrium.

    It is immutable.  Its arguments are copied, so later changes of them do not reach it, while gradients do reach them.
    Attributes cannot be set, and after an in-place write to one of its matrices every use raises an error; `replace`
    makes a changed model.

    Arguments:
        A: (n, n).  All four matrices are dense, or all are sparse (COO or CSR; kept as coalesced COO).
        B: (n, p).
        C: (q, n).
        D: (q, p); zeros when left out.
        b_x, b_y: (n,) and (q,), dense; zeros when left out.
        blocks: pairs (activation, size) whose sizes add up to n, or one activation for the whole state.  They come
            downstream first, so that A of a feed-forward network is block upper triangular, but any order is taken.

    Raises:
        ArgumentError: shapes, dtypes, devices or layouts that do not fit together; at the call, an input that does not;
            at any use, a matrix that was written to in place.

    Source: El Ghaoui, Gu, Travacca, Askari & Tsai, Implicit Deep Learning, SIAM J. Math. Data Sci. 3 (2021).

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel
        >>> model = ImplicitModel(input_dim=3, output_dim=2, hidden_dim=5)
        >>> space = model.statespace()
        >>> space
        StateSpace(n=5, p=3, q=2, blocks=relu 5, dense torch.float32)
        >>> u = torch.randn(4, 3)
        >>> torch.equal(space(u), model(u))
        True
    """

    A, B, C, D, b_x, b_y = (_Unchanged(name) for name in _TENSORS)
    blocks: tuple[Block, ...]
    _tensors: dict[str, Tensor]
    _versions: list[int | None]

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        b_x: Tensor | None = None,
        b_y: Tensor | None = None,
        blocks: Activation | Sequence[tuple[Activation, int]] = RELU,
    ) -> None:
        _check_matrices({"A": A, "B": B, "C": C})
        n, p, q = A.shape[0], B.shape[1], C.shape[0]
        given = {
            "A": A, "B": B, "C": C, "D": A.new_zeros(q, p) if D is None else D,
            "b_x": torch.zeros(n, dtype=A.dtype, device=A.device) if b_x is None else b_x,
            "b_y": torch.zeros(q, dtype=A.dtype, device=A.device) if b_y is None else b_y,
        }  # fmt: skip
        self._hold({name: _copied(tensor) for name, tensor in given.items()}, blocks)

    def _hold(self, tensors: dict[str, Tensor], blocks: Activation | Sequence[tuple[Activation, int]]) -> None:
        _check_matrices({name: tensors[name] for name in "ABCD"})
        tensors |= {name: normalized(tensors[name]) for name in "ABCD"}
        # Through the instance's own dictionary, since no attribute can be set.
        vars(self).update(
            _tensors=tensors,
            _versions=[version(tensor) for tensor in tensors.values()],
            blocks=_blocks(blocks, tensors["A"].shape[0]),
        )
        _check_fit(self)

    def _unchanged(self) -> dict[str, Tensor]:
        """The tensors, after a check that none was written to in place."""
        tensors = self._tensors
        for (name, tensor), before in zip(tensors.items(), self._versions, strict=True):
            if version(tensor) != before:
                raise wrong(
                    WHO, f"{name} as it was when the model was made", "one that was written to in place",
                    f"A model does not change; make another with replace({name}=…).",
                )  # fmt: skip
        return tensors

    def __setattr__(self, name: str, value: object) -> None:
        do = f"Make another with replace({name}=…)." if name in (*_TENSORS, "blocks") else ""
        raise ImmutableError(str(wrong(WHO, "a model to stay as it was made", f"{name} to be set", do)))

    def __delattr__(self, name: str) -> None:
        raise ImmutableError(str(wrong(WHO, "a model to stay as it was made", f"{name} to be deleted")))

    @classmethod
    def affine(cls, D: Tensor, b_y: Tensor | None = None) -> StateSpace:
        """The model without states, y = Du + b_y.

        Example:
            >>> import torch
            >>> from implicitdl import StateSpace
            >>> StateSpace.affine(torch.tensor([[1.0, 2.0]]))(torch.ones(1, 2))
            tensor([[3.]])
        """
        q, p = D.shape
        return cls(D.new_zeros(0, 0), D.new_zeros(0, p), D.new_zeros(q, 0), D, b_y=b_y, blocks=())

    @classmethod
    def elementwise(cls, activation: Activation, size: int, like: Tensor) -> StateSpace:
        """y = φ(u) for u of this size; dtype, device and layout are those of the matrix ``like``.

        Example:
            >>> import torch
            >>> from implicitdl import StateSpace
            >>> from implicitdl.activations import RELU
            >>> StateSpace.elementwise(RELU, 2, like=torch.zeros(1, 1))(torch.tensor([[1.0, -1.0]]))
            tensor([[1., 0.]])
        """
        identity = eye(errors.positive_int(WHO, "size", size), like)
        return cls(like.new_zeros(size, size), identity, identity, blocks=activation)

    @property
    def n(self) -> int:
        """States."""
        return self.A.shape[0]

    @property
    def p(self) -> int:
        """Features of the input."""
        return self.B.shape[1]

    @property
    def q(self) -> int:
        """Features of the output."""
        return self.C.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    @property
    def is_sparse(self) -> bool:
        return is_sparse(self.A)

    @property
    def sizes(self) -> tuple[int, ...]:
        """States of each block."""
        return tuple(block.size for block in self.blocks)

    @property
    def slopes(self) -> Tensor:
        """(n,) max|φ'| of every state."""
        slopes = [block.activation.lipschitz for block in self.blocks for _ in range(block.size)]
        return torch.tensor(slopes, dtype=self.dtype, device=self.device)

    @cached_property
    def activation(self) -> Activation:
        """φ of the whole state, each block's own on its columns of (..., n)."""
        return joined(self.blocks)

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, C and D."""
        return self.A, self.B, self.C, self.D

    def replace(self, **changes: Any) -> StateSpace:
        """A model with some of A, B, C, D, b_x, b_y and blocks changed."""
        return self.holding(**{name: _copied(given) for name, given in changes.items()})

    def holding(self, **changes: Any) -> StateSpace:
        """`replace` without a copy, for tensors that nobody else holds."""
        if unknown := changes.keys() - {*_TENSORS, "blocks"}:
            raise wrong(WHO, f"changes of {', '.join(_TENSORS)} and blocks", ", ".join(sorted(unknown)))
        blocks = changes.pop("blocks", self.blocks)
        other = object.__new__(type(self))
        other._hold(self._unchanged() | changes, blocks)
        return other

    def to(self, *where: Any, **how: Any) -> StateSpace:
        """The model on another device or in another dtype, with the arguments of `torch.Tensor.to`."""
        return self._mapped(lambda tensor: tensor.to(*where, **how))

    def detach(self) -> StateSpace:
        """The model without the graph of its matrices."""
        return self._mapped(Tensor.detach)

    def to_sparse(self) -> StateSpace:
        """The model with sparse matrices."""
        return self._mapped(lambda tensor: sparse(tensor) if tensor.dim() == 2 else tensor)

    def to_dense(self) -> StateSpace:
        """The model with dense matrices."""
        return self._mapped(lambda tensor: tensor.to_dense())

    def __call__(self, u: Tensor) -> Tensor:
        """The prediction y, (batch, q), for an input (batch, \\*any) that flattens to (batch, p)."""
        u = self.flat(u)
        return self.read_out(self.state(u), u)

    def solve(
        self,
        u: Tensor,
        x0: Tensor | None = None,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> Solution:
        """The state x, (batch, n), and how well it was found.

        Arguments:
            u: input (batch, \\*any) that flattens to (batch, p).
            x0: (batch, n), where the parts that loop start; zeros when left out.
            solver, adjoint, on_failure: as for `fixed_point`, for the parts that loop.

        Returns:
            The `Solution`.  ``steps`` counts the evaluations of the part that took most, 1 where nothing loops;
            ``residual`` bounds that of the whole state.  ``backward`` is filled when one part loops; a `Monitor` sees
            the solves of all.
        """
        u = self.flat(u)
        if x0 is not None and x0.shape != (len(u), self.n):
            raise wrong(WHO, f"x0 of shape (batch={len(u)}, n={self.n})", tuple(x0.shape))
        b = linear(u, self.B, self.b_x)
        # A plan that is kept must not hold a graph, which the first backward would free.
        order = self._plan() if self.A.requires_grad else self._frozen_plan
        return solve_in_order(order, b, self.sizes, x0, solver, adjoint, on_failure)

    def state(self, u: Tensor, x0: Tensor | None = None, **how: Any) -> Tensor:
        """The state x alone, (batch, n), with the arguments of `solve`."""
        return self.solve(u, x0, **how).value  # type: ignore[return-value]

    def pre_activation(self, x: Tensor, u: Tensor) -> Tensor:
        """z = Ax + Bu + b_x."""
        return linear(x, self.A, linear(u, self.B, self.b_x))

    def read_out(self, x: Tensor, u: Tensor) -> Tensor:
        """y = Cx + Du + b_y."""
        return linear(u, self.D, linear(x, self.C, self.b_y))

    def __matmul__(self, inner: StateSpace) -> StateSpace:
        """``outer @ inner``: u ↦ outer(inner(u))."""
        if not isinstance(inner, StateSpace):
            return NotImplemented
        outer, inner = alike("cascade", self, inner)
        if outer.p != inner.q:
            raise wrong("cascade", f"an outer model whose p is q={inner.q} of the inner one", f"p={outer.p}")
        states = [outer.n, inner.n]
        return outer.holding(
            A=assemble([[outer.A, product(outer.B, inner.C)], [None, inner.A]], states, states),
            B=assemble([[product(outer.B, inner.D)], [inner.B]], states, [inner.p]),
            C=assemble([[outer.C, product(outer.D, inner.C)]], [outer.q], states),
            D=product(outer.D, inner.D),
            b_x=torch.cat((outer.b_x + outer.B @ inner.b_y, inner.b_x)),
            b_y=outer.b_y + outer.D @ inner.b_y,
            blocks=outer.blocks + inner.blocks,
        )

    def __add__(self, other: StateSpace) -> StateSpace:
        """u ↦ self(u) + other(u)."""
        if not isinstance(other, StateSpace):
            return NotImplemented
        first, second = models = alike("add", self, other)
        same_size("add", "p", models)
        same_size("add", "q", models)
        return first.holding(
            **side_by_side(models),
            B=assemble([[first.B], [second.B]], [first.n, second.n], [first.p]),
            C=assemble([[first.C, second.C]], [first.q], [first.n, second.n]),
            D=first.D + second.D,
            b_y=first.b_y + second.b_y,
        )

    def __mul__(self, factor: float) -> StateSpace:
        """u ↦ factor · self(u)."""
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise wrong("scale", "factor to be a finite number", repr(factor))
        return self.holding(C=factor * self.C, D=factor * self.D, b_y=factor * self.b_y)

    __rmul__ = __mul__

    def __neg__(self) -> StateSpace:
        return -1.0 * self

    def __sub__(self, other: StateSpace) -> StateSpace:
        return self + -other if isinstance(other, StateSpace) else NotImplemented

    def __repr__(self) -> str:
        blocks = ", ".join(f"{block.activation.name} {block.size}" for block in self.blocks) or "none"
        entries = sum(map(count_nonzero, self.matrices))
        layout = f"sparse with {entries:,} nonzeros" if self.is_sparse else "dense"
        return f"StateSpace(n={self.n}, p={self.p}, q={self.q}, blocks={blocks}, {layout} {self.dtype})"

    def __reduce__(self) -> Any:
        # Without what was derived from the matrices.
        return type(self), (*self._unchanged().values(), self.blocks)

    @cached_property
    def _frozen_plan(self) -> list[Component]:
        # A plan made in inference mode could not be used outside of it.
        with torch.inference_mode(False):
            return self._plan()

    def _plan(self) -> list[Component]:
        # The plan reads all of A in any case.
        check_finite(WHO, self)
        return plan(self.A, self.blocks)

    def flat(self, given: Tensor) -> Tensor:
        """An input (batch, \\*any) as rows (batch, p), checked."""
        if not isinstance(given, Tensor):
            raise wrong(WHO, f"u to be a tensor of shape (batch, p={self.p})", type(given).__name__)
        u = given.flatten(1) if given.dim() > 2 else given
        if u.dim() != 2 or u.shape[1] != self.p or u.shape[0] == 0:
            raise wrong(WHO, f"u of shape (batch ≥ 1, p={self.p})", tuple(given.shape), _layout(given, self.p))
        errors.same_place(WHO, "u", u, self.A)
        errors.finite(WHO, "u", u)
        return u

    def _mapped(self, f: Callable[[Tensor], Tensor]) -> StateSpace:
        return self.holding(**{name: f(tensor) for name, tensor in self._unchanged().items()})


def _layout(u: Tensor, p: int) -> str:
    """How an input that does not fit is given."""
    if u.numel() == 0:
        return "Give at least one sample, batch first."
    if u.dim() == 1 and len(u) == p:
        return "One sample is a batch of one: u.unsqueeze(0)."
    if u.dim() > 2 and u.shape[-1] == p:
        return f"Samples stand along one dimension: u.flatten(0, {u.dim() - 2})."
    return f"Pass {p} features a sample."


class HasStateSpace(Protocol):
    """A model that can write itself as its matrices; `ImplicitModel` does."""

    def statespace(self) -> StateSpace: ...


Model: TypeAlias = StateSpace | HasStateSpace


def space_of(who: str, model: Model) -> StateSpace:
    """The model's matrices, in its own layout and dtype, without a graph."""
    if not isinstance(model, StateSpace):
        if not callable(getattr(model, "statespace", None)):
            raise wrong(
                who, "an ImplicitModel, a StateSpace, or a model with statespace()", type(model).__name__,
                "Convert a network with implicitdl.statespace.from_module.",
            )  # fmt: skip
        model = model.statespace()
    return model.detach()


def check_finite(who: str, space: StateSpace) -> None:
    """Refuse matrices and biases with entries that are not finite."""
    for name, tensor in space._unchanged().items():
        errors.finite(who, name, tensor.values() if is_sparse(tensor) else tensor, errors.DIVERGED)


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; it shares the number with its views.  None where torch keeps none."""
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else None


def alike(who: str, *models: StateSpace) -> tuple[StateSpace, ...]:
    """The models in one layout, sparse when any is; their dtypes and devices must agree."""
    if not models:
        raise wrong(who, "at least one model", "none")
    for other in models[1:]:
        if (other.dtype, other.device) != (models[0].dtype, models[0].device):
            raise wrong(
                who, f"models of one dtype and device, {models[0].dtype} on {models[0].device}",
                f"{other.dtype} on {other.device}", "Move one of them with .to().",
            )  # fmt: skip
    return tuple(m.to_sparse() for m in models) if any(m.is_sparse for m in models) else models


def same_size(who: str, size: str, models: Sequence[StateSpace]) -> None:
    sizes = [getattr(m, size) for m in models]
    if len(set(sizes)) > 1:
        raise wrong(who, f"models of the same {size}", sizes)


def side_by_side(models: Sequence[StateSpace]) -> dict[str, Any]:
    """The states of several models that do not see each other."""
    return {
        "A": block_diagonal([m.A for m in models]),
        "b_x": torch.cat([m.b_x for m in models]),
        "blocks": sum((m.blocks for m in models), ()),
    }


def _copied(given: Any) -> Any:
    """A copy of a tensor; any other value is left for the checks to refuse."""
    return normalized(given).clone() if isinstance(given, Tensor) else given


def _check_matrices(given: Mapping[str, Any]) -> None:
    for name, M in given.items():
        if not isinstance(M, Tensor) or M.dim() != 2 or not M.is_floating_point():
            got: object = (tuple(M.shape), M.dtype) if isinstance(M, Tensor) else type(M).__name__
            raise wrong(WHO, f"{name} to be a floating-point matrix", got)


def _blocks(given: Activation | Sequence[tuple[Activation, int]], n: int) -> tuple[Block, ...]:
    if isinstance(given, Activation):
        return (Block(given, n),) if n else ()
    blocks = tuple(Block(*pair) for pair in given)
    for activation, size in blocks:
        if not isinstance(activation, Activation):
            raise wrong(WHO, "blocks of pairs (Activation, size)", repr(activation))
        errors.positive_int(WHO, "the size of a block", size)
    return blocks


def _check_fit(space: StateSpace) -> None:
    """Refuse tensors and blocks whose sizes, dtypes, devices or layouts do not go together."""
    n, p, q = space.n, space.p, space.q
    if sum(space.sizes) != n:
        raise wrong(WHO, f"blocks whose sizes add up to n={n}", f"{list(space.sizes)}, {sum(space.sizes)} in all")
    shapes = {"A": (n, n), "B": (n, p), "C": (q, n), "D": (q, p), "b_x": (n,), "b_y": (q,)}
    for (name, tensor), shape in zip(space._tensors.items(), shapes.values(), strict=True):
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
