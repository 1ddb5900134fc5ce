"""Pruning: fewer weights, rules for which ones to lose, and a bound on what their loss does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor

from .._internal.errors import open_unit, wrong
from .matrices import count_nonzero
from .perron import evaluation_error, gains, loop_gain, spread
from .space import Model, StateSpace, space_of

Scores = tuple[Tensor, ...]  # how much each entry of A, B, C and D counts
Rule = Callable[[StateSpace, Tensor], Scores]


@dataclass(frozen=True)
class Pruning:
    """A pruned model, and how far it can be from the one it came from on the inputs that were given.

    Attributes:
        space: the model with its lost weights zero; `reduce` takes out the states that no longer matter.
        kept: weights of A, B, C and D that are left.
        total: weights of A, B, C and D that were not zero before.  Biases are neither counted nor pruned.
        state_bound: (batch, n) in float64, ≥ |x − x'|; inf where λ_pf of the original is not below 1.
        output_bound: (batch, q) in float64, ≥ |y − y'|.
    """

    space: StateSpace
    kept: int
    total: int
    state_bound: Tensor
    output_bound: Tensor


def magnitude(space: StateSpace, u: Tensor) -> Scores:
    """|w|, the same for every matrix."""
    return tuple(M.abs() for M in space.matrices)


def sensitivity(space: StateSpace, u: Tensor) -> Scores:
    """|w| (E Σ_k (∂y_k/∂w)²)^½: to first order, what the outputs for u change when w alone is lost.

    With the adjoints V_k = ∂y_k/∂z, (batch, n), ∂y_k/∂a_ij = V_ki x_j, so that the squared scores of A are
    A² ∘ E (Σ_k V_k²)ᵀ x², a single matrix product, and likewise for the other matrices.

    Source: LeCun, Denker & Solla, Optimal Brain Damage (1990), whose saliency this is for the squared distance to the
    unpruned outputs, with the Gauss–Newton diagonal.
    """
    x, power = space.state(u), _adjoint_power(space, u)
    by_x, by_u = x * x, u * u
    squares = (power.t() @ by_x, power.t() @ by_u, by_x.sum(0), by_u.sum(0))
    return tuple(M.abs() * (square / len(u)).sqrt() for M, square in zip(space.matrices, squares, strict=True))


def error_bound(space: StateSpace, u: Tensor) -> Scores:
    """What w adds to a bound on E Σ_k |y_k − y'_k|: losing the smallest keeps the bound as small as can be.

    Where the gain (I − |A|)⁻¹ is large it is cheapest to lose C, and with it all that it reads: compare the weights of
    each matrix among themselves, by `within_each`.

    Pruning makes no |a_ij| larger, so |x − x'| ≤ (I − Λ|A|)⁻¹ Λ (|ΔA||x| + |ΔB||u|), Λ = max|φ'|, and
    |y − y'| ≤ |C||x − x'| + |ΔC||x| + |ΔD||u|.  Summed over the outputs, with ω = Λ(I − |A|ᵀΛ)⁻¹|C|ᵀ1, a lost weight
    adds ω_i |a_ij| E|x_j|, ω_i |b_ij| E|u_j|, |c_ki| E|x_i| or |d_kj| E|u_j|.

    Raises:
        ArgumentError: λ_pf(Λ|A|) ≥ 1, with the number.

    Source: THEORY §2, the pruning error.
    """
    if not (gain := loop_gain(space)) < 1:
        raise wrong("error_bound", "λ_pf(|A|) max|φ'| < 1", f"{gain:.6g}", "Prune by magnitude or by sensitivity.")
    x, v = space.state(u).abs().mean(0), u.abs().mean(0)
    slopes = space.slopes
    gap = torch.eye(space.n, dtype=space.dtype, device=space.device) - gains(space).t()
    omega = slopes * torch.linalg.solve(gap, space.C.abs().sum(0))
    shares = (torch.outer(omega, x), torch.outer(omega, v), x, v)
    return tuple(M.abs() * share for M, share in zip(space.matrices, shares, strict=True))


def within_each(rule: Rule) -> Rule:
    """The rule that keeps the same share of each of A, B, C and D, those that score highest there by ``rule``.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel, prune
        >>> from implicitdl.statespace import error_bound, within_each
        >>> model = ImplicitModel(input_dim=10, output_dim=10, hidden_dim=10)
        >>> pruning = prune(model, torch.randn(5, 10), keep=0.5, by=within_each(error_bound))
        >>> [int((M != 0).sum()) for M in pruning.space.matrices]
        [50, 50, 50, 50]
    """

    @wraps(rule)
    def ranked(space: StateSpace, u: Tensor) -> Scores:
        scores = rule(space, u)
        return tuple(_standing(score, M) for score, M in zip(scores, space.matrices, strict=True))

    return ranked


def _standing(score: Tensor, M: Tensor) -> Tensor:
    """The share of M's weights that do not score higher, 1 for the best."""
    place = score.flatten().argsort(descending=True).argsort().view_as(M)
    return 1 - place / max(1, count_nonzero(M))


def prune(model: Model, u: Tensor, *, keep: float, by: Rule = magnitude) -> Pruning:
    """The model with only the weights that count most, and a bound on what it loses.

    Arguments:
        model: an `ImplicitModel` or a `StateSpace`; it is not changed.
        u: inputs (batch, \\*any), for which the weights should count and the bounds hold.
        keep: share of the weights of A, B, C and D to keep, in (0, 1).
        by: the rule, ``magnitude``, ``sensitivity``, ``error_bound`` or a function like them, (space, u) → scores of
            A, B, C and D; the weights with the largest scores stay.

    Returns:
        The `Pruning`.

    Raises:
        ArgumentError: keep outside (0, 1), no model or no rule, an input that does not fit, or a rule that does not
            apply.

    Source: THEORY §2: |x − x'| ≤ (I − |A|)⁻¹ (|ΔA||x'| + |ΔB||u|), |y − y'| ≤ |C||x − x'| + |ΔC||x'| + |ΔD||u|.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel, prune
        >>> model = ImplicitModel(input_dim=8, output_dim=2, hidden_dim=16, dtype=torch.float64)
        >>> u = torch.randn(32, 8, dtype=torch.float64)
        >>> pruning = prune(model, u, keep=0.5)
        >>> pruning.kept, pruning.total
        (216, 432)
        >>> bool(((pruning.space(u) - model(u)).abs() <= pruning.output_bound).all())
        True
    """
    open_unit("prune", "keep", keep)
    if not callable(by):
        raise wrong("prune", "by to be a rule, (space, u) → scores", repr(by), "Pass statespace.magnitude itself.")
    space = space_of("prune", model)
    full = space.to_dense()
    u = full.flat(u).detach()
    scores = torch.cat([score.flatten() for score in by(full, u)])
    # A weight that is zero already must not take the place of one that is not.
    filled = torch.cat([M.flatten() for M in full.matrices]) != 0
    total = int(filled.sum())
    chosen = torch.zeros_like(filled)
    chosen[scores.masked_fill(~filled, -torch.inf).topk(max(1, round(keep * total))).indices] = True
    masks = chosen.split([M.numel() for M in full.matrices])
    pruned = full.holding(
        **{name: M * mask.view_as(M) for name, M, mask in zip("ABCD", full.matrices, masks, strict=True)}
    )
    state_bound, output_bound = _bounds(full.to(torch.float64), pruned.to(torch.float64), u.double())
    return Pruning(
        pruned.to_sparse() if space.is_sparse else pruned,
        sum(map(count_nonzero, pruned.matrices)), total, state_bound, output_bound,
    )  # fmt: skip


def _bounds(space: StateSpace, pruned: StateSpace, u: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds on |x − x'| and |y − y'| for the x' that was found: its residual and rounding count as part of ΔA x'."""
    x = pruned.state(u)
    lost_A, lost_B, lost_C, lost_D = ((M - N).abs().t() for M, N in zip(space.matrices, pruned.matrices, strict=True))
    size, v = x.abs(), u.abs()
    if not loop_gain(space) < 1:
        return torch.full_like(x, torch.inf), torch.full((len(u), space.q), torch.inf, dtype=x.dtype, device=x.device)
    off = (pruned.activation.phi(pruned.pre_activation(x, u)) - x).abs()
    lost = size @ lost_A + v @ lost_B + evaluation_error(space, x, u)
    e = spread(space, off + space.slopes * lost)
    return e, e @ space.C.abs().t() + size @ lost_C + v @ lost_D


def _adjoint_power(space: StateSpace, u: Tensor) -> Tensor:
    """Σ_k V_k², (batch, n), with V_k = ∂y_k/∂z: the derivatives for an input that is added to z."""
    identity = torch.eye(space.n, dtype=space.dtype, device=space.device)
    nudged = space.holding(B=torch.cat((space.B, identity), 1), D=torch.cat((space.D, torch.zeros_like(space.C)), 1))
    nudge = torch.zeros(len(u), space.n, dtype=space.dtype, device=space.device, requires_grad=True)
    with torch.enable_grad():
        y = nudged(torch.cat((u, nudge), 1))
        power = torch.zeros_like(nudge)
        for k in range(space.q):
            (V,) = torch.autograd.grad(y[:, k].sum(), nudge, retain_graph=True)
            power += V * V
    return power.detach()
