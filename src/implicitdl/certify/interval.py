"""Interval propagation: the box of states is itself the solution of an implicit model, of twice the size.

For a nondecreasing φ, and A⁺ = max(A, 0), A⁻ = min(A, 0), the ends of the states' box solve

    x̄ = φ(A⁺x̄ + A⁻x̲ + b̄),   x̲ = φ(A⁺x̲ + A⁻x̄ + b̲),      [b̲, b̄] ∋ Bu + b_x for every u of the box.

That is one equilibrium in (x̄, x̲), the model's `embedding`, whose matrix has the row sums of A: what solves and
differentiates the model does the same for its bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import wrong
from ..adjoints import Adjoint
from ..solution import OnFailure
from ..solvers import Solver
from ..statespace import StateSpace, embedding
from .contraction import Contractive, Method, Upper, in_boxes
from .functionals import Box, Functionals


@dataclass(frozen=True, eq=False)
class Enclosure:
    """Boxes that hold the state and the pre-activation for every input of a box.

    Attributes:
        x: of x, (batch, n).
        z: of Ax + Bu + b_x, (batch, n).
        magnitude: Σ_j |A_ij||x_j| + Σ_k |B_ik||u_k| + |b_i| at most, to which the rounding of z_i is relative.
    """

    x: Box
    z: Box
    magnitude: Tensor


def ends(
    space: StateSpace, u: Box, solver: Solver | None, adjoint: Adjoint | None = None, on_failure: OnFailure = "warn"
) -> Box:
    """The states' box, (batch, n), as the solver finds it; differentiable."""
    center, radius = input_term(space, u)
    identity = torch.eye(space.n, dtype=center.dtype, device=center.device)
    # Its input is Bu + b_x itself: B is applied to centre and radius, at half the price of the two ends.
    doubled = embedding(StateSpace(space.A, identity, identity, blocks=space.blocks))
    b = torch.cat([center + radius, center - radius], 1)
    upper, lower = doubled.state(b, solver=solver, adjoint=adjoint, on_failure=on_failure).chunk(2, 1)
    # What the solver's tolerance leaves must not turn a box of one point inside out.
    return Box(torch.minimum(lower, upper), torch.maximum(lower, upper))


def input_term(space: StateSpace, u: Box) -> tuple[Tensor, Tensor]:
    """Centre and radius of Bu + b_x."""
    return torch.addmm(space.b_x, u.center, space.B.t()), u.radius @ space.B.abs().t()


def pre_activation(space: StateSpace, x: Box, b: tuple[Tensor, Tensor]) -> Box:
    """The box of Ax + b for x in its box and b given by centre and radius."""
    center = torch.addmm(b[0], x.center, space.A.t())
    radius = torch.addmm(b[1], x.radius, space.A.abs().t())
    return Box(center - radius, center + radius)


def enclosure(model: Contractive, u: Box, solver: Solver | None) -> Enclosure:
    """A box of states that holds the equilibrium of every input of the box, however well the solver did.

    A box X with F(X) ⊆ X, F being interval arithmetic, is mapped into itself by x ↦ φ(Ax + Bu + b) for every u of the
    box; by Brouwer's theorem it holds a fixed point, and the contraction has only one.  So the solver's box is
    widened until its image, computed with its rounding outwards, is seen to lie inside it, and the image is returned.
    """
    space = model.space
    for block in space.blocks:
        if not block.activation.slope[0] >= 0:
            raise wrong(
                "Interval", "a nondecreasing φ", f"{block.activation.name}, of slopes {block.activation.slope}",
                "Use Sensitivity(), which needs only their largest absolute value.",
            )  # fmt: skip
    found = ends(space, u, solver, on_failure="ignore")
    b = input_term(space, u)
    b_size = u.magnitude @ space.B.abs().t() + space.b_x.abs()

    def image(w: Tensor) -> tuple[Box, Enclosure]:
        x = Box(found.lower - w, found.upper + w)
        magnitude = x.magnitude @ space.A.abs().t() + b_size
        z = pre_activation(space, x, b).widened(model.slack(magnitude))
        return x, Enclosure(outwards(space.activation.phi(z.lower), space.activation.phi(z.upper)), z, magnitude)

    def outside(w: Tensor) -> Tensor:
        x, inner = image(w)
        return torch.maximum(inner.x.upper - x.upper, x.lower - inner.x.lower)

    return image(model.widening(outside, len(u.lower)))[1]


def outwards(low: Tensor, high: Tensor) -> Box:
    """φ is computed to a few units in the last place, and to the smallest normal number where it is next to 0."""
    limits = torch.finfo(low.dtype)
    return Box(low - 8 * limits.eps * low.abs() - limits.tiny, high + 8 * limits.eps * high.abs() + limits.tiny)


@dataclass(frozen=True, kw_only=True)
class Interval(Method):
    """Interval propagation, for a nondecreasing φ; never looser than `Sensitivity`.

    Source: Gowal et al., On the Effectiveness of Interval Bound Propagation (2018), for layers; Jafarpour et al.,
    Robustness Certificates for Implicit Neural Networks (2021), for equilibria.
    """

    def uppers(self, model: Contractive, u: Box, of: Sequence[Functionals]) -> list[Upper]:
        x = enclosure(model, u, self.solver).x
        return [in_boxes(model, x, u, part) for part in of]
