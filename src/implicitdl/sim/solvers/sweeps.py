"""ADMM over all rows at once, in the eigenbasis of the Gram matrix: cheap sweeps that find most of the support."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...constraints.norm import project_l1

# Over-relaxation between 1.5 and 1.8 is customary (Boyd et al. 2011, §3.4.3).
_RELAXATION = 1.6
# Sweeps between two balancings of ρ; the residuals need a few to settle.
_BALANCE = 10


def sweep(
    gram: Tensor,
    q: Callable[[Tensor], Tensor],
    start: Tensor,
    n: int,
    lam: float,
    kappa: float,
    rho: float | None,
    sweeps: int,
) -> Tensor:
    """ADMM on ½aᵀGa − qᵀa + λ‖a‖₁, the first n entries in the ball of radius κ, for every row.

        x = (G + ρI)⁻¹(q + ρ(a − y)),   a = prox(x + y),   y = y + x − a

    In the eigenbasis of G the inverse is a division, so that every row has a ρ of its own, which is balanced: the
    relative primal and dual residuals are kept about equal.

    Arguments:
        gram: G, (d, d).
        q: a ↦ (rows, d), asked for again whenever ρ is balanced.
        start: a, (rows, d).
        rho: ρ to begin with; None for the mean eigenvalue of G.
        sweeps: how many.

    Returns:
        a, (rows, d).

    Source: Boyd et al., Distributed optimization and statistical learning via ADMM (2011), §6.4 for the lasso and
        §3.4.1 for balancing, with residuals relative as in Wohlberg, arXiv:1704.06209.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    scale = float(values.mean()) or 1.0
    a, y = start, torch.zeros_like(start)
    weight = torch.full_like(a[:, :1], rho or scale)
    for count in range(sweeps):
        if count % _BALANCE == 0:
            linear = q(a)
        x = ((linear + weight * (a - y)) @ vectors / (values + weight)) @ vectors.t()
        relaxed = _RELAXATION * x + (1 - _RELAXATION) * a
        before, a = a, _prox(relaxed + y, lam / weight, n, kappa)
        y = y + relaxed - a
        if count % _BALANCE == _BALANCE - 1:
            primal = _size(x - a) * _size(weight * y)
            dual = _size(weight * (a - before)) * torch.maximum(_size(x), _size(a))
            # A factor of ten at most, and never so small a ρ that x has the rounding of a singular G.
            factor = (primal / dual).sqrt().nan_to_num(1.0).clamp(0.1, 10.0)
            factor = (weight * factor).clamp(min=1e-10 * scale) / weight
            weight, y = weight * factor, y / factor
    return a


def _prox(v: Tensor, threshold: Tensor, n: int, kappa: float) -> Tensor:
    shrunk = v.sign() * (v.abs() - threshold).clamp(min=0)
    return torch.cat([project_l1(shrunk[:, :n], kappa), shrunk[:, n:]], dim=1)


def _size(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)
