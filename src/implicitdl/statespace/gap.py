"""(I − M)⁻¹, what is left of equations that are linear."""

from __future__ import annotations

import torch
from torch import Tensor

from .._internal.errors import wrong
from .graph import looping
from .matrices import count_nonzero, dense, eye, is_sparse, product, sparse


def inverse_of_gap(who: str, what: str, M: Tensor) -> Tensor:
    """(I − M)⁻¹, in the layout of M.

    Where M has no loops it is I + M + M² + …, which ends, and stays sparse when M is.

    Raises:
        ArgumentError: singular up to rounding, with the singular values.
    """
    identity = eye(M.shape[0], M)
    if not looping(M.detach())[0]:
        total, power = identity, M
        while count_nonzero(power):
            total, power = total + power, product(power, M)
        return total.coalesce() if is_sparse(total) else total
    gap = dense(identity - M)
    singular = torch.linalg.svdvals(gap.detach())
    if not float(singular[-1]) > len(gap) * torch.finfo(gap.dtype).eps * float(singular[0]):
        raise wrong(
            who, f"{what} to be invertible",
            f"a smallest singular value of {float(singular[-1]):.3g} beside a largest of {float(singular[0]):.3g}",
        )  # fmt: skip
    inverse = torch.linalg.inv(gap)
    return sparse(inverse) if is_sparse(M) else inverse
