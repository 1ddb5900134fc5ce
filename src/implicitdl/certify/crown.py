"""The adjoint bound: linear relaxation (CROWN) of an implicit model, an equilibrium with the transposed matrix.

Between lines that hold every φ, the largest value of cᵀx + dᵀu + e over the boxes is at most

    max over u of (Bᵀψ + d)ᵀu + ψᵀb_x + t̄ᵀv₊ + t̲ᵀv₋ + e,      v = c + Aᵀψ,  ψ = s̄v₊ + s̲v₋,

where s̄, t̄ and s̲, t̲ are slope and offset of the upper and the lower line of each state, v₊ = max(v, 0) and
v₋ = min(v, 0).  For vᵀx ≤ ψᵀz + t̄ᵀv₊ + t̲ᵀv₋ with z = Ax + Bu + b_x, so that cᵀx keeps the term (c + Aᵀψ − v)ᵀx, which
vanishes where v solves its equation.  That equation contracts where the model's does, since s̄ and s̲ lie in [0, max φ'].
What an inexact v leaves, δ = c + Aᵀψ − v, is bounded by δᵀx over the box of x, so every v gives a true bound.

Source: Zhang et al., Efficient Neural Network Robustness Certification with General Activation Functions (2018), for
layers; Li, Wang & Lin, CerDEQ (2022), for the adjoint equation of an equilibrium; the correction is derived above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._internal.errors import non_negative_int, settle, wrong
from ..activations import ELU, HARDTANH, SIGMOID, SOFTPLUS, TANH, Activation
from ..adjoints import Adjoint, ImplicitAdjoint
from ..equations.equilibrium import Equilibrium
from ..fixed_point import fixed_point
from ..solution import OnFailure
from ..solvers import Solver
from ..statespace import StateSpace
from .contraction import Contractive, Method, Upper, in_boxes
from .functionals import Box, Functionals, pre_activations
from .interval import Enclosure, enclosure, outwards

# Activations whose φ' rises and then falls, or does only one of the two: on an interval it is least at one of the ends.
_ONE_HUMP = (TANH, SIGMOID, HARDTANH, SOFTPLUS, ELU)
# Numbers held at a time for the products with B, (samples · functionals, p): 128 MiB of float64.
_AT_ONCE = 1 << 24
# Bounds closer than this differ by what rounding was allowed for, and by the tolerance of their solves.
_TIE = 1e-8
# Adam's step in a slope, which lies between 0 and 1.
_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class Crown(Method):
    """The adjoint bound, implicit CROWN; the smaller of it and the interval bound, since the raw one may be above.

    Arguments:
        steps: of Adam on the slopes of the lower lines, for every functional its own; 0 chooses them by the smaller
            triangle.
        rounds: how often the intervals of the pre-activations are refined by the bound itself, which costs two adjoint
            solves for every state that may be on either side of its kink.  The result is never looser than without.
        solver: as for `Method`.

    Source: see the head of this file.
    """

    steps: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        settle(self, non_negative_int, "steps", "rounds")

    def uppers(self, model: Contractive, u: Box, of: Sequence[Functionals]) -> list[Upper]:
        inside = enclosure(model, u, self.solver)
        by_interval = [in_boxes(model, inside.x, u, part).value for part in of]
        smallest = by_interval
        for round_ in range(self.rounds + 1):
            if round_:
                inside = refined(model, inside, u, self.steps, self.solver)
            between = lines(model.space, inside.z)
            raw = [certified_uppers(model, part, between, inside, u, self.steps, self.solver) for part in of]
            smallest = [torch.minimum(before, now) for before, now in zip(smallest, raw, strict=True)]
        lost = [above - below > _TIE * (1 + below.abs()) for above, below in zip(raw, by_interval, strict=True)]
        return [Upper(*both) for both in zip(smallest, lost, strict=True)]


class Lines(NamedTuple):
    """low_slope z + low_offset ≤ φ(z) ≤ high_slope z + high_offset on the interval, (batch, n) each.

    Attributes:
        least, most: any slope between them, with offset 0, gives a valid lower line too; equal to ``low_slope``
            where there is no choice.
    """

    high_slope: Tensor
    high_offset: Tensor
    low_slope: Tensor
    low_offset: Tensor
    least: Tensor
    most: Tensor


def lines(space: StateSpace, z: Box) -> Lines:
    """The lines of every state; differentiable in the ends of its interval.

    Raises:
        ArgumentError: an activation for which no lines are known.
    """
    ends = zip(z.lower.split(list(space.sizes), 1), z.upper.split(list(space.sizes), 1), strict=True)
    parts = [_of(block.activation, low, high) for block, (low, high) in zip(space.blocks, ends, strict=True)]
    return Lines(*(torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))) if parts else Lines(*[z.lower] * 6)


def _of(phi: Activation, low: Tensor, high: Tensor) -> Lines:
    if phi.homogeneous:
        one = low.new_ones(())
        left, right = -float(phi.phi(-one)), float(phi.phi(one))
        if 0 <= left <= right:
            return _kink(left, right, low, high)
    elif phi in _ONE_HUMP:
        return _parallel(phi, low, high)
    known = ", ".join(["relu", "leaky_relu", "identity", *(one_hump.name for one_hump in _ONE_HUMP)])
    raise wrong("Crown", f"activations of {known}", phi.name, "Use Interval() or Sensitivity().")


def _kink(left: float, right: float, low: Tensor, high: Tensor) -> Lines:
    """φ(z) = right·z for z ≥ 0 and left·z below, convex: the chord above it, any slope between the two below.

    The slope on the side where more of the interval lies makes the smaller triangle.
    """
    across = (low < 0) & (high > 0)
    # Numbers become tensors of the interval's dtype: where() of two of them is of torch's default dtype, which may hold
    # less than float64 does of a slope such as 0.01.
    lower, upper = torch.full_like(low, left), torch.full_like(low, right)
    settled = torch.where(low >= 0, upper, lower)
    # Where nothing crosses the kink the width may be 0, and where() would still differentiate the quotient.
    width = torch.where(across, high - low, 1.0)
    chord = torch.where(across, (right * high - left * low) / width, settled)
    offset = torch.where(across, (left - chord) * low, 0.0)
    chosen = torch.where(across, torch.where(high > -low, upper, lower), settled)
    zero = torch.zeros_like(low)
    least, most = (torch.where(across, slope, settled) for slope in (lower, upper))
    return Lines(chord, offset, chosen, zero, least, most)


def _parallel(phi: Activation, low: Tensor, high: Tensor) -> Lines:
    """Two lines of slope λ = min φ' on the interval, through the ends of the graph.

    φ(high) − φ(z) = ∫φ' ≥ λ(high − z) puts the upper line through the upper end, and likewise the lower one.
    """
    slope = torch.minimum(phi.dphi(low), phi.dphi(high))
    return Lines(slope, phi.phi(high) - slope * high, slope, phi.phi(low) - slope * low, slope, slope)


class Relaxation(NamedTuple):
    """v and ψ of every functional, (batch, m, n)."""

    v: Tensor
    psi: Tensor


class TwoSlopes(Equilibrium):
    """ψ ↦ s̄ v₊ + s̲ v₋ with v = c + ψA, in rows; the slopes differ from row to row."""

    def __init__(self, A: Tensor, c: Tensor, high: Tensor, low: Tensor) -> None:
        super().__init__(A.t(), c, _bent(high, low))
        self.high, self.low = high, low

    def take(self, rows: Tensor) -> TwoSlopes:
        return TwoSlopes(self.A.t(), self.b[rows], self.high[rows], self.low[rows])


def _bent(high: Tensor, low: Tensor) -> Activation:
    """v ↦ s̄v₊ + s̲v₋; the slopes may be variables, and then get their gradient."""
    return Activation(
        "two slopes",
        lambda v: torch.addcmul(low * v, high - low, v.clamp(min=0)),
        lambda v: torch.where(v > 0, high, low).detach(),
        (0.0, 1.0),
        homogeneous=True,
    )


def relaxation(
    space: StateSpace,
    of: Functionals,
    high: Tensor,
    low: Tensor,
    solver: Solver | None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = "warn",
) -> Relaxation:
    """Solve the adjoint equation for slopes of the lines that are (batch, m or 1, n); differentiable."""
    c = of.c[of.index]
    if space.n == 0:
        return Relaxation(c, c)
    f = TwoSlopes(space.A, *(part.expand_as(c).flatten(0, 1) for part in (c, high, low)))
    start = f.activation.phi(f.b).detach()
    psi = fixed_point(f, start, solver=solver, adjoint=adjoint, on_failure=on_failure).value
    assert isinstance(psi, Tensor)
    return Relaxation(torch.addmm(f.b, psi, space.A).view_as(c), psi.view_as(c))


def upper(
    space: StateSpace, of: Functionals, found: Relaxation, high_offset: Tensor, low_offset: Tensor, u: Box
) -> Tensor:
    """The bound, (batch, m), for a v that solves its equation; differentiable."""
    w = found.psi @ space.B + of.d[of.index]
    offsets = _dot(found.v.clamp(min=0), high_offset) + _dot(found.v.clamp(max=0), low_offset)
    return _dot(w, u.center) + _dot(w.abs(), u.radius) + found.psi @ space.b_x + offsets + of.e[of.index]


def certified_upper(
    model: Contractive, of: Functionals, between: Lines, low: Tensor, inside: Enclosure, u: Box, solver: Solver | None
) -> Tensor:
    """The bound, (batch, m), however well v was found, with every rounding upwards."""
    space = model.space
    high = between.high_slope.unsqueeze(1)
    v, psi = relaxation(space, of, high, low, solver, on_failure="ignore")
    psi = torch.where(v > 0, high, low) * v
    c = of.c[of.index]
    left = c + psi @ space.A - v
    value = upper(space, of, Relaxation(v, psi), between.high_offset, between.low_offset, u)
    value = value + _dot(left, inside.x.center) + _dot(left.abs(), inside.x.radius)
    # Every term of the bound by its absolute values: those of A, B and b_x add up to |ψ| · magnitude, and a line is
    # off by the rounding of its ends.
    terms = _dot(psi.abs() + v.abs() * model.space.slopes, inside.magnitude) + _dot(v.abs(), inside.x.magnitude)
    return value + model.slack(terms + of.magnitude(inside.x, u))


def certified_uppers(
    model: Contractive, of: Functionals, between: Lines, inside: Enclosure, u: Box, steps: int, solver: Solver | None
) -> Tensor:
    """`certified_upper` with lower lines improved in some steps, and a part of the functionals at a time."""
    at_once = max(1, _AT_ONCE // (len(of.index) * max(model.space.p, model.space.n, 1)))
    parts = []
    for index in of.index.split(at_once, 1):
        some = Functionals(of.c, of.d, of.e, index)
        low = improved_slopes(model.space, some, between, u, steps, solver)
        parts.append(certified_upper(model, some, between, low, inside, u, solver))
    return torch.cat(parts, 1)


def improved_slopes(
    space: StateSpace, of: Functionals, between: Lines, u: Box, steps: int, solver: Solver | None
) -> Tensor:
    """The slopes of the lower lines, (batch, m or 1, n), after steps of Adam on the bound; each functional's best."""
    low = between.low_slope.unsqueeze(1)
    if steps == 0 or space.n == 0:
        return low
    least, most = between.least.unsqueeze(1), between.most.unsqueeze(1)
    with torch.enable_grad():
        free = low.repeat(1, of.index.shape[1], 1).requires_grad_()
        best, lowest = free.detach().clone(), torch.full_like(of.e[of.index], torch.inf)
        optimiser = torch.optim.Adam([free], lr=_RATE)
        adjoint = ImplicitAdjoint() if solver is None else ImplicitAdjoint(solver=solver)
        for _ in range(steps):
            found = relaxation(space, of, between.high_slope.unsqueeze(1), free, solver, adjoint, "ignore")
            bound = upper(space, of, found, between.high_offset, between.low_offset, u)
            better = (bound < lowest).detach()
            best = torch.where(better.unsqueeze(2), free.detach(), best)
            lowest = torch.where(better, bound.detach(), lowest)
            optimiser.zero_grad()
            bound.sum().backward()
            optimiser.step()
            with torch.no_grad():
                free.copy_(free.clamp(least, most))
    return best


def refined(model: Contractive, inside: Enclosure, u: Box, steps: int, solver: Solver | None) -> Enclosure:
    """The enclosure with the adjoint bound of every pre-activation whose lines do not coincide yet."""
    between = lines(model.space, inside.z)
    loose = (between.high_slope != between.low_slope) | (between.high_offset != between.low_offset)
    most = int(loose.sum(1).max()) if model.space.n else 0
    if most == 0:
        return inside
    # Each sample's own loose states come first; one that has fewer than others repeats settled ones, for nothing.
    units = loose.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    of = pre_activations(model.space, units)
    high = certified_uppers(model, of, between, inside, u, steps, solver)
    low = -certified_uppers(model, -of, between, inside, u, steps, solver)
    z = Box(
        inside.z.lower.scatter(1, units, torch.maximum(inside.z.lower.gather(1, units), low)),
        inside.z.upper.scatter(1, units, torch.minimum(inside.z.upper.gather(1, units), high)),
    )
    x = outwards(model.space.activation.phi(z.lower), model.space.activation.phi(z.upper))
    both = Box(torch.maximum(x.lower, inside.x.lower), torch.minimum(x.upper, inside.x.upper))
    return Enclosure(both, z, inside.magnitude)


def _dot(rows: Tensor, with_each: Tensor) -> Tensor:
    """(batch, m, k) and (batch, k) to (batch, m)."""
    return torch.bmm(rows, with_each.unsqueeze(2)).squeeze(2)
