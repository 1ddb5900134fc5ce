"""The monotone set I − A ⪰ mI: larger than any ball, and solved by operator splitting."""

from __future__ import annotations

import torch
from torch import Tensor

from .._internal.errors import open_unit, wrong
from ..activations import Activation
from .base import Constraint


class Monotone(Constraint):
    """A = (1 − m)I − PᵀP + Q − Qᵀ, so that the symmetric part of I − A has no eigenvalue below m.

    Then x = φ(Ax + b) has exactly one solution for every φ with slopes in [0, 1], however large A is.  Plain
    iteration need not find it; `PeacemanRachford` and `ForwardBackward` do.

    One free matrix holds both factors: P = √(1 − m) I + the upper triangle of raw, Q = its strict lower triangle.
    That is n² numbers for a set of n² dimensions, nothing is lost (every positive semidefinite matrix has a
    triangular factor), raw = 0 is A = 0, and A changes at first order when a small raw does.

    Arguments:
        kappa: κ = 1 − m in (0, 1), the largest eigenvalue that the symmetric part of A may have.
        lipschitz: max φ', at most 1; a φ of smaller slope does not enlarge the set, whose splitting needs m as it is.
        m: the strong monotonicity m in (0, 1), in place of κ.

    Source: Winston & Kolter, Monotone operator equilibrium networks (2020).

    Example:
        >>> import torch
        >>> from implicitdl.constraints import Monotone
        >>> A = Monotone(m=0.1)(10 * torch.randn(4, 4))
        >>> bool(torch.linalg.eigvalsh((A + A.t()) / 2).max() <= 0.9 + 1e-4)
        True
    """

    def __init__(self, kappa: float | None = None, lipschitz: float = 1.0, *, m: float | None = None) -> None:
        super().__init__(_kappa(type(self).__name__, kappa, m), lipschitz)
        if self.lipschitz > 1.0:
            raise wrong(
                type(self).__name__, "a φ with slopes in [0, 1]", f"max|φ'| = {lipschitz:.6g}",
                "Use an activation such as RELU or TANH, or a ball of weights such as RowScaling.",
            )  # fmt: skip

    @property
    def m(self) -> float:
        """The strong monotonicity of I − A."""
        return 1.0 - self.kappa

    @property
    def radius(self) -> float:
        """κ, the largest real part of an eigenvalue of a member; ‖A‖ has no bound."""
        return self.kappa

    def forward(self, raw: Tensor) -> Tensor:
        unit = self._eye(raw)
        P, Q = raw.triu() + self.kappa**0.5 * unit, raw.tril(-1)
        with torch.autocast(raw.device.type, enabled=False):  # PᵀP in half precision would have negative eigenvalues
            square = P.t() @ P
        return self.kappa * unit - square + Q - Q.t()

    def right_inverse(self, A: Tensor) -> Tensor:
        if not self.contains(A):
            raise wrong(
                "Monotone.right_inverse", f"a member of the set (I − A ⪰ mI, m={self.m:.6g})",
                f"a smallest eigenvalue of {monotonicity(A):.6g}",
                "Pass constraint(A), which is a member, but another matrix.",
            )  # fmt: skip
        # From eigenvectors and QR, not by Cholesky, which stops at a singular matrix: on the boundary PᵀP is one.
        unit = self._eye(A)
        squares, vectors = torch.linalg.eigh(self.kappa * unit - (A + A.t()) / 2)
        P = torch.linalg.qr(squares.clamp(min=0).sqrt().unsqueeze(1) * vectors.t()).R
        P = torch.ones_like(A[0]).masked_fill(P.diagonal() < 0, -1.0).unsqueeze(1) * P
        return (P - self.kappa**0.5 * unit).triu() + ((A - A.t()) / 2).tril(-1)

    def contains(self, A: Tensor) -> bool:
        # PᵀP has the rounding of its own entries, which are as large as those of A; the eigenvalues add theirs.
        rounding = A.shape[-1] * torch.finfo(A.dtype).eps * max(1.0, float(A.detach().abs().max()))
        return monotonicity(A) >= self.m - rounding

    def extra_repr(self) -> str:
        return f"m={self.m:.6g}"

    @staticmethod
    def _eye(like: Tensor) -> Tensor:
        return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)


def require_proximal(who: str, activation: Activation) -> None:
    """φ is the proximal operator of a convex function, which a monotone model needs, if its slopes lie in [0, 1]."""
    low, high = activation.slope
    if low < 0 or high > 1:
        raise wrong(
            who, "an activation with slopes in [0, 1] for a monotone model",
            f"{activation.name}, with slopes in [{low:.4g}, {high:.4g}]",
            "Use one such as RELU or TANH, or a ball of weights such as RowScaling.",
        )  # fmt: skip


def _kappa(who: str, kappa: float | None, m: float | None) -> float:
    """κ = 1 − m from the one of the two that was given; 0.99 from neither."""
    if m is None:
        return 0.99 if kappa is None else kappa
    if kappa is not None:
        raise wrong(who, "either kappa or m = 1 − kappa", f"kappa={kappa} and m={m}", "Leave one out.")
    return 1.0 - open_unit(who, "m", m)


def monotonicity(A: Tensor) -> float:
    """The smallest eigenvalue of the symmetric part of I − A, for a real or complex A or a batch of them."""
    A = A.detach().to(torch.complex128 if A.is_complex() else torch.float64)
    return float(1 - torch.linalg.eigvalsh((A + A.mH) / 2).amax())
