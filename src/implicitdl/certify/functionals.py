"""Boxes of inputs, affine functions of state and input bounded on them, and the scores of classes.

A model with one output tells two classes apart by its sign: label 1 where y > 0, else label 0.  Its scores are (0, y).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import finite, wrong
from ..statespace import StateSpace


@dataclass(frozen=True, eq=False)
class Box:
    """The inputs u with lower ≤ u ≤ upper, a box for every sample.

    Arguments:
        lower, upper: (batch, p).

    Raises:
        ArgumentError: shapes that differ, entries that are not finite, or a lower end above the upper one.

    Example:
        >>> import torch
        >>> from implicitdl.certify import Box
        >>> box = Box.around(torch.tensor([[0.0, 0.5]]), 0.1)
        >>> box.lower, box.upper
        (tensor([[0.0000, 0.4000]], dtype=torch.float64), tensor([[0.1000, 0.6000]], dtype=torch.float64))
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        lower, upper = self.lower, self.upper
        if lower.dim() != 2 or lower.shape != upper.shape or lower.shape[0] == 0:
            raise wrong("Box", "lower and upper of shape (batch ≥ 1, p)", (tuple(lower.shape), tuple(upper.shape)))
        finite("Box", "lower", lower)
        finite("Box", "upper", upper)
        if bool((lower > upper).any()):
            where = tuple((lower > upper).nonzero()[0].tolist())
            raise wrong("Box", "lower ≤ upper", f"{float(lower[where]):.6g} > {float(upper[where]):.6g} at {where}")

    @classmethod
    def around(cls, u: Tensor, eps: float | Tensor, domain: tuple[float, float] | None = (0.0, 1.0)) -> Box:
        """The points of the domain with |u' − u| ≤ ε in every component, in float64.

        Its faces are rounded to nearest; every bound leaves room for that, as for the rounding of centre and radius.

        Arguments:
            u: (batch, \\*any), inside the domain; flattened to (batch, p).
            eps: ε ≥ 0, a number or a tensor that broadcasts over (batch, p).
            domain: the least and the greatest value that an input may have; None for any.

        Raises:
            ArgumentError: a negative ε, or a u outside the domain.
        """
        if bool((torch.as_tensor(eps, device=u.device) < 0).any()):
            raise wrong("Box.around", "ε ≥ 0", eps)
        # Exact for a float32 u, whose own arithmetic would move the faces by its rounding.
        u = u.detach().flatten(1).double()
        if domain is None:
            return cls(u - eps, u + eps)
        low, high = domain
        if bool(((u < low) | (u > high)).any()):
            raise wrong(
                "Box.around", f"u in the domain [{low:g}, {high:g}]", f"values in [{float(u.min()):.6g}, "
                f"{float(u.max()):.6g}]", "Pass the domain of your inputs, or domain=None.",
            )  # fmt: skip
        return cls((u - eps).clamp(min=low), (u + eps).clamp(max=high))

    @property
    def center(self) -> Tensor:
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        return (self.upper - self.lower) / 2

    @property
    def magnitude(self) -> Tensor:
        """max |u| over the box, entry by entry."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def widened(self, by: Tensor) -> Box:
        """The box with every face moved outwards by a distance ≥ 0."""
        return Box(self.lower - by, self.upper + by)

    def to(self, like: Tensor) -> Box:
        """In the dtype and on the device of a tensor."""
        return Box(self.lower.to(like), self.upper.to(like))


@dataclass(frozen=True, eq=False)
class Functionals:
    """cᵀx + dᵀu + e: for every sample, m of a bank of K functions.

    Many samples ask for the same few, so the bank is multiplied once and the products are picked.

    Attributes:
        c: (K, n).
        d: (K, p).
        e: (K,).
        index: (batch, m), which of the bank each sample asks for.
    """

    c: Tensor
    d: Tensor
    e: Tensor
    index: Tensor

    def __neg__(self) -> Functionals:
        return Functionals(-self.c, -self.d, -self.e, self.index)

    def upper(self, x: Box, u: Box) -> Tensor:
        """(batch, m), the largest value over states and inputs that vary freely in their boxes."""
        every = (
            x.center @ self.c.t() + x.radius @ self.c.abs().t() + u.center @ self.d.t() + u.radius @ self.d.abs().t()
        )
        return (every + self.e).gather(1, self.index)

    def magnitude(self, x: Box, u: Box) -> Tensor:
        """(batch, m), the sum of the absolute values of all terms, to which rounding is relative."""
        every = x.magnitude @ self.c.abs().t() + u.magnitude @ self.d.abs().t()
        return (every + self.e.abs()).gather(1, self.index)


def outputs(space: StateSpace, batch: int) -> Functionals:
    """Every component of y, for every sample."""
    return Functionals(space.C, space.D, space.b_y, _all(space.q, batch, space.b_y))


def rivals(space: StateSpace, labels: Tensor) -> Functionals:
    """s_j − s_label of the scores s of every class j: nowhere positive where the label wins."""
    q = classes(space.q)
    scores = [score_rows(M) for M in (space.C, space.D, space.b_y)]
    c, d, e = ((rows.unsqueeze(0) - rows.unsqueeze(1)).flatten(0, 1) for rows in scores)
    # Pair (label, j) stands at label·q + j.
    return Functionals(c, d, e, labels.unsqueeze(1) * q + _all(q, len(labels), space.b_y))


def pre_activations(space: StateSpace, units: Tensor) -> Functionals:
    """z_i = A_i x + B_i u + b_i for the units (batch, m)."""
    return Functionals(space.A, space.B, space.b_x, units)


def _all(size: int, batch: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device).expand(batch, size)


def classes(q: int) -> int:
    """Number of classes of a model with q outputs."""
    return max(q, 2)


def scores(y: Tensor) -> Tensor:
    """Class scores, (batch, classes), of outputs (batch, q)."""
    return torch.cat([torch.zeros_like(y), y], 1) if y.shape[1] == 1 else y


def score_rows(M: Tensor) -> Tensor:
    """Rows of C, D or b_y for the scores, (classes, ·); of one output, a row of zeros comes first."""
    return torch.cat([torch.zeros_like(M), M]) if len(M) == 1 else M


def right(y: Tensor, labels: Tensor) -> Tensor:
    """Whether the outputs give the label, (batch,) bool; with several outputs a tie counts as wrong."""
    return (y[:, 0] > 0) == (labels > 0) if y.shape[1] == 1 else losing_by(y, labels) < 0


def losing_by(y: Tensor, labels: Tensor) -> Tensor:
    """Lead of the best other class, max_j≠label s_j − s_label, (batch,)."""
    s, own = scores(y), labels.unsqueeze(1)
    return s.scatter(1, own, -torch.inf).amax(1) - s.gather(1, own).squeeze(1)


def check_labels(who: str, labels: Tensor, batch: int, q: int | None = None) -> None:
    """Refuse labels that are not (batch,) class numbers; q is the number of outputs, if it is known already."""
    if not isinstance(labels, Tensor):
        raise wrong(who, f"labels of shape (batch={batch},) int64", type(labels).__name__, "Make a tensor of them.")
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        one_hot = labels.dim() == 2 and len(labels) == batch and labels.shape[1] > 1
        do = "Pass class numbers: labels.argmax(1)." if one_hot else "Pass one class number for every sample."
        raise wrong(who, f"labels of shape (batch={batch},) int64", (tuple(labels.shape), labels.dtype), do)
    if q is not None and bool(((labels < 0) | (labels >= classes(q))).any()):
        raise wrong(
            who, f"labels from 0 to {classes(q) - 1}", f"{int(labels.min())} to {int(labels.max())}",
            "With one output they are 0 and 1: it says 1 where y > 0." if q == 1 else "",
        )  # fmt: skip
