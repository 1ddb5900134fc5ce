"""Samples that influence one another: what every sample claims for itself, beside what the whole batch says."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..equations.map import Map
from ..solution import CoupledRowsWarning
from .iterate import SolveResult

# Roundings by which two evaluations of f on the same sample may differ, in units of ‖f(x)‖: the order of a sum of
# some hundred terms depends on how many rows a product has.
_ROUNDINGS = 16


def are_coupled(f: Map, found: SolveResult) -> bool:
    """Whether samples that were solved each on its own influence one another, by all that is known of them.

    Samples that ended at one evaluation had all others at their solutions in it, and need no other.

    Arguments:
        f: the map of the whole batch.
        found: the result of the solve.
    """
    if len(found.x) == 1 or (found.all_converged and not found.apart):
        return False
    x = found.x.detach()
    fx = f(x).detach() if found.fx is None else found.fx
    if f.root:  # whose claim is no norm of its value
        return _influence(f, x, fx)
    return _disagree(f, x, fx, found) or (not found.all_converged and _influence(f, x, fx))


def _disagree(f: Map, x: Tensor, fx: Tensor, found: SolveResult) -> bool:
    """Whether the residual of a sample, with all others at their solutions too, is not the one it was solved to.

    A sample is frozen, or leaves the batch, when it is done.  Where f maps each sample on its own, that changes its
    residual by rounding; where others that moved on influence it, by what they moved it.
    """
    precision = f.precision or fx.dtype
    if fx.dtype in (torch.bfloat16, torch.float16):
        x, fx = x.float(), fx.float()
    size = torch.linalg.vector_norm(fx, dim=1)
    change = torch.linalg.vector_norm(fx - x, dim=1)
    claimed = found.stats.residual.to(change.dtype)
    allowed = 2 * claimed.clamp(min=found.rtol) + _ROUNDINGS * torch.finfo(precision).eps
    # A claim of infinity is a sample that is lost, and said to be.
    return bool((torch.isfinite(claimed) & ~(change <= allowed * (size + found.floor))).any())


def _influence(f: Map, x: Tensor, fx: Tensor) -> bool:
    """Whether moving some samples moves what f gives for the others: seen by moving one half, and then the other half.

    For samples that have missed the tolerance, of which the residual tells nothing.
    """
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0), device="cpu").to(x.device)
    rounding = _ROUNDINGS * torch.finfo(f.precision or fx.dtype).eps
    step = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-3) / 8
    for half in (drawn[: len(x) // 2], drawn[len(x) // 2 :]):
        still = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, half, False)
        moved = f(torch.where(still.unsqueeze(1), x, x + step))
        change = torch.linalg.vector_norm((moved - fx).float(), dim=1)
        # The value of a root problem is near 0; what it changes by where x was moved has its units.
        size = change[~still].max() if f.root else torch.linalg.vector_norm(fx[still].float(), dim=1)
        # What is not finite on either side says nothing.
        if bool((change[still] > rounding * size).any()):
            return True
    return False


def announce_coupling(who: str) -> None:
    # The same words every time, so that Python shows them once.
    warnings.warn(
        f"{who}: the samples of the batch influence one another: solved each on its own, some missed the tolerance as "
        "soon as the others had moved. The batch was solved again as one. Pass coupled=True to do that at once, with "
        "one residual for all, or let f map each sample on its own.",
        CoupledRowsWarning,
        stacklevel=2,
    )
