"""StateSpace: x = φ(Ax + Bu + b_x), y = Cx + Du + b_y, with its matrices in the open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._internal import errors
from .._internal.errors import wrong
from ..activations import RELU, Activation
from ..adjoints import Adjoint
from ..solution import OnFailure, Solution
from ..solvers import Solver
from . import algebra
from .blocks import Block, joined
from .form import WHO, Held, ImmutableError, blocks_given, check_finite, check_form, copied, version, well_formed
from .matrices import count_nonzero, dense, eye, is_sparse, linear, normalized, sparse, zeros
from .solve import Component, plan, solve_in_order

_TENSORS = ("A", "B", "C", "D", "b_x", "b_y")


class StateSpace:
    """The model x = φ(Ax + Bu + b_x), y = Cx + Du + b_y, as its matrices and the φ of every block of states.

    Any network is one (its layers are blocks, A is block triangular), and models compose into models: ``m2 @ m1``,
    ``m1 + m2``, ``a * m`` and the functions of `implicitdl.statespace`.  Calling it solves for x in the order of the
    blocks: what does not loop costs one pass, what does is an equilibrium.

    It is one moment of a model: it copies what it is given, so that what is done to that later does not reach it, while
    gradients reach what was given.  Nothing of it can be set, and where a matrix of its was written to in place every
    use is an error: `replace` makes another model.

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

    A, B, C, D, b_x, b_y = (Held(name) for name in _TENSORS)
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
        given = {"A": A, "B": B, "C": C, "D": A if D is None else D}
        well_formed(given)
        n, p, q = A.shape[0], B.shape[1], C.shape[0]
        given |= {
            "D": zeros(q, p, normalized(A)) if D is None else D,
            "b_x": torch.zeros(n, dtype=A.dtype, device=A.device) if b_x is None else b_x,
            "b_y": torch.zeros(q, dtype=A.dtype, device=A.device) if b_y is None else b_y,
        }
        self._hold({name: copied(tensor) for name, tensor in given.items()}, blocks)

    def _hold(self, tensors: dict[str, Tensor], blocks: Activation | Sequence[tuple[Activation, int]]) -> None:
        tensors |= well_formed(tensors)
        # By the instance's own dictionary, since nothing of it can be set.
        vars(self).update(
            _tensors=tensors,
            _versions=[version(tensor) for tensor in tensors.values()],
            blocks=blocks_given(blocks, tensors["A"].shape[0]),
        )
        check_form(self)

    def _unchanged(self) -> dict[str, Tensor]:
        """The tensors, which are what they were when the model was made."""
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
        return cls(zeros(0, 0, D), zeros(0, p, D), zeros(q, 0, D), D, b_y=b_y, blocks=())

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
        return cls(zeros(size, size, like), identity, identity, blocks=activation)

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
        return self.holding(**{name: copied(given) for name, given in changes.items()})

    def holding(self, **changes: Any) -> StateSpace:
        """As `replace`, for tensors that were made for it, which it need not copy."""
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
        return self._mapped(lambda tensor: dense(tensor) if tensor.dim() == 2 else tensor)

    def __call__(self, u: Tensor) -> Tensor:
        """The prediction y, (batch, q), for an input (batch, \\*any) that flattens to (batch, p)."""
        u = self.flat(u)
        return self.read_out(self._solved(u).value, u)  # type: ignore[arg-type]

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
        return self._solved(u, x0, solver, adjoint, on_failure)

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
        return algebra.cascade(self, inner)

    def __add__(self, other: StateSpace) -> StateSpace:
        """u ↦ self(u) + other(u)."""
        if not isinstance(other, StateSpace):
            return NotImplemented
        return algebra.add(self, other)

    def __sub__(self, other: StateSpace) -> StateSpace:
        if not isinstance(other, StateSpace):
            return NotImplemented
        return algebra.add(self, algebra.scale(other, -1.0))

    def __neg__(self) -> StateSpace:
        return algebra.scale(self, -1.0)

    def __mul__(self, factor: float) -> StateSpace:
        """u ↦ factor · self(u)."""
        return algebra.scale(self, factor)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        blocks = ", ".join(f"{block.activation.name} {block.size}" for block in self.blocks) or "none"
        entries = sum(map(count_nonzero, self.matrices))
        layout = f"sparse with {entries:,} nonzeros" if self.is_sparse else "dense"
        return f"StateSpace(n={self.n}, p={self.p}, q={self.q}, blocks={blocks}, {layout} {self.dtype})"

    def __reduce__(self) -> Any:
        # Without what was derived from the matrices.
        return type(self), (*self._unchanged().values(), self.blocks)

    @cached_property
    def _frozen_order(self) -> list[Component]:
        # Made in inference mode, it could not be used outside of it.
        with torch.inference_mode(False):
            return self._planned()

    def _order(self) -> list[Component]:
        # What is kept must not hold a graph, which the first backward would free.
        return self._planned() if self.A.requires_grad else self._frozen_order

    def _planned(self) -> list[Component]:
        # The plan reads all of A in any case.
        check_finite(WHO, self)
        return plan(self.A, self.blocks)

    def _solved(
        self,
        u: Tensor,
        x0: Tensor | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> Solution:
        b = linear(u, self.B, self.b_x)
        return solve_in_order(self._order(), b, self.sizes, x0, solver, adjoint, on_failure)

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
