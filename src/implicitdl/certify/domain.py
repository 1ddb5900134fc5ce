"""The sets of inputs that a bound is about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import finite, wrong


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
        """The box with every face moved outwards, by ≥ 0."""
        return Box(self.lower - by, self.upper + by)

    def to(self, like: Tensor) -> Box:
        """In the dtype and on the device of a tensor."""
        return Box(self.lower.to(like), self.upper.to(like))
