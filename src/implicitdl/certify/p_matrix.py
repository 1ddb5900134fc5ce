"""P-matrices: all principal minors positive, which decides whether a ReLU equilibrium is well posed."""

from __future__ import annotations

import torch
from torch import Tensor

from .._internal.errors import wrong

# 2²⁰ principal minors take about a second; every further state doubles that.
LARGEST = 20


def p_matrix(M: Tensor, off: Tensor | None = None) -> bool | None:
    """Whether all 2ⁿ − 1 principal minors of M are positive.

    M is one exactly when m₁₁ > 0 and both M without its first row and column and the Schur complement of m₁₁ are.  That
    recursion runs level by level on whole stacks of matrices, with a bound of the rounding carried beside every entry.

    Arguments:
        M: (n, n), n ≤ 20.
        off: (n, n), by how much the entries of M may be off; 0 when left out.

    Returns:
        True or False when that is certain; None when rounding leaves it open.

    Raises:
        ArgumentError: n > 20.

    Source: Tsatsomeros & Li, A recursive test for P-matrices (2000).

    Example:
        >>> import torch
        >>> from implicitdl.certify import p_matrix
        >>> p_matrix(torch.tensor([[1.0, -5.0], [5.0, 1.0]])), p_matrix(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        (True, False)
    """
    if M.dim() != 2 or M.shape[0] != M.shape[1]:
        raise wrong("p_matrix", "a square matrix", tuple(M.shape))
    if len(M) > LARGEST:
        raise wrong(
            "p_matrix", f"n ≤ {LARGEST}", f"n={len(M)}, with 2^{len(M)} principal minors",
            "Use the Perron–Frobenius or the monotone condition.",
        )  # fmt: skip
    stack = M.detach().double().unsqueeze(0)
    error = torch.zeros_like(stack) if off is None else off.double().unsqueeze(0)
    while stack.shape[1]:
        pivot, known_to = stack[:, 0, 0], error[:, 0, 0]
        if bool((pivot <= -known_to).any()):
            return False  # all earlier pivots are certain, and a minor is their product with this one
        if not bool((pivot > known_to).all()):
            return None
        rest, rest_error = stack[:, 1:, 1:], error[:, 1:, 1:]
        complement, complement_error = _schur(stack, error)
        stack, error = torch.cat([rest, complement]), torch.cat([rest_error, complement_error])
    return True


def _schur(M: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """M₂₂ − M₂₁M₁₂/m₁₁ of every matrix of a stack, and a bound of how far it is off when M is off by E."""
    column, row, pivot = M[:, 1:, :1], M[:, :1, 1:], M[:, :1, :1]
    column_error, row_error, pivot_error = E[:, 1:, :1], E[:, :1, 1:], E[:, :1, :1]
    product = column * row / pivot
    complement = M[:, 1:, 1:] - product
    # |ab/p − a'b'/p'| ≤ (|a'b' − ab| + |ab/p||p' − p|)/|p'| with |p'| ≥ p − E_p, and three roundings of eps/2 each;
    # 4 eps also covers those of this bound, which is a sum of nonnegative terms.
    numerator = column_error * row.abs() + column.abs() * row_error + column_error * row_error
    carried = (numerator + product.abs() * pivot_error) / (pivot - pivot_error)
    rounded = 4 * torch.finfo(M.dtype).eps * (M[:, 1:, 1:].abs() + product.abs() + carried)
    return complement, E[:, 1:, 1:] + carried + rounded
