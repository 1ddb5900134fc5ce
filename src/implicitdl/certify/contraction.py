"""The dense float64 form of a model that bounds are computed from, its proof of contraction, and sensitivity bounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._internal.errors import ArgumentError, wrong
from ..solution import ConvergenceError
from ..solvers import Solver
from ..statespace import StateSpace, eliminate_diagonal, perron_root
from ..statespace.perron import gains, least_weights
from ..statespace.space import Model, check_finite, space_of
from .functionals import Box, Functionals

# Attempts at a box that maps into itself: one widening in exact arithmetic, one or two more for rounding.
_ATTEMPTS = 50


def relative_rounding(terms: int, dtype: torch.dtype) -> float:
    """Relative to the sum of absolute values, how far a computed sum of products of so many terms may be off.

    A dot product of m terms, added in any order, is off by at most m·u/(1 − m·u) of Σ|a_k b_k|, with u = eps/2
    (Higham, Accuracy and Stability of Numerical Algorithms, §3.1).  Twice that, and 32 terms more, covers the few
    further roundings of a bound: of the weights' own scaling, of a box's faces, centre and radius, and of adding parts.
    """
    return (terms + 32) * torch.finfo(dtype).eps


def exact_space(who: str, model: Model) -> StateSpace:
    """The model's matrices, dense, in float64, without a graph.

    Float32 weights are taken as they are: exactly.  Of a low-rank model, A is LRᵀ as its own dtype rounds it.
    """
    space = space_of(who, model).to_dense().to(torch.float64)
    check_finite(who, space)
    return space


def without_self_loops(space: StateSpace) -> StateSpace:
    """The same model with a zero diagonal of A where ReLU allows it; differentiable.

    Bounds get tighter by it, since they treat the states that a state depends on as if they varied freely.
    """
    try:
        return eliminate_diagonal(space)
    except ArgumentError:  # another φ, or a_ii ≥ 1: the loops stay, and count with their absolute values
        return space


@dataclass(frozen=True, eq=False)
class Contractive:
    """A model and the proof that its state equation contracts: Mv ≤ γv for M = diag(max|φ'|)|A|, v > 0 and γ < 1.

    Two states under the same input then satisfy |x' − x| ≤ M|x' − x|, so that they are equal, and a disturbance w of
    the equation moves the state by at most (I − M)⁻¹w.

    Attributes:
        space: dense float64, without self-loops.
        M: (n, n).
        v: (n,).
        gamma: γ, with the rounding of its own computation.
    """

    space: StateSpace
    M: Tensor
    v: Tensor
    gamma: float

    @property
    def rounding(self) -> float:
        """How far a product with the rows of this model may be off, relative to the sum of absolute values."""
        return relative_rounding(self.space.n + self.space.p, self.space.dtype)

    def slack(self, terms: Tensor) -> Tensor:
        """How far sums of products whose absolute values add up to ``terms`` may be off, underflow included.

        A product below the smallest normal number is off by less than that number, whatever its own size.
        """
        limits = torch.finfo(self.space.dtype)
        return self.rounding * (terms + limits.tiny / limits.eps)

    def widening(self, outside: Callable[[Tensor], Tensor], batch: int) -> Tensor:
        """A widening w ≥ 0 along v, (batch, n), at which ``outside(w)`` is seen to be nowhere positive.

        ``outside`` says by how much the image of a box, widened by w, sticks out of it.  With t = max_i outside_i/v_i,
        a further τv is enough as soon as τ ≥ t/(1 − γ), for then t v + M(τv) ≤ tv + γτv ≤ τv.  That is exact
        arithmetic; the loop repeats it until it holds as computed.

        Raises:
            ConvergenceError: it never does, since something is not finite.
        """
        w = self.v.new_zeros(batch, len(self.v))
        for _ in range(_ATTEMPTS):
            excess = outside(w)
            if bool((excess <= 0).all()):
                return w
            w = w + (excess / self.v).amax(1, keepdim=True).clamp(min=0) * (1.5 / (1 - self.gamma)) * self.v
        raise ConvergenceError(
            f"certify: no box that maps into itself was found in {_ATTEMPTS} widenings (γ = {self.gamma:.6g}). "
            "Check that weights and inputs are finite."
        )


def contractive(who: str, model: Model | Contractive) -> Contractive:
    """The model with its proof of contraction.

    Raises:
        ArgumentError: λ_pf(diag(max|φ'|)|A|) ≥ 1 after elimination of self-loops, with the number.
    """
    if isinstance(model, Contractive):
        return model
    space = without_self_loops(exact_space(who, model))
    M = gains(space)
    found = perron_certificate(M)
    if found is None:
        raise wrong(
            who, "a model with λ_pf(diag(max|φ'|)|A|) < 1, self-loops eliminated", f"{perron_root(M):.6g}",
            "The box bounds need a contraction; see certify.well_posed(model) for what else can be proved.",
        )  # fmt: skip
    return Contractive(space, M, *found)


def perron_certificate(M: Tensor) -> tuple[Tensor, float] | None:
    """v > 0 and γ < 1 with Mv ≤ γv, for M ≥ 0 in float64; None where λ_pf(M) ≥ 1, or is too near 1 to tell.

    Whatever v was found by, γ = max (Mv)_i/v_i is a bound (Collatz–Wielandt), and it is raised by the rounding of its
    own computation: a sum of nonnegative terms is accurate relative to itself.
    """
    root = perron_root(M)
    # A root nearer to 1 than its own rounding is no proof.
    if not root < 1 - 1e-8:
        return None
    # κ halfway between root and 1 keeps v well scaled and γ away from 1.
    v = least_weights(M, (1 + root) / 2)
    if v is None:
        return None
    gamma = float(((M @ v) / v).max()) * (1 + relative_rounding(len(M), M.dtype)) if len(M) else 0.0
    return (v, gamma) if gamma < 1 else None


def sensitivity(model: Model | Contractive) -> Tensor:
    """S = |C|(I − M)⁻¹G|B| + |D|, with G = diag(max|φ'|) and M = G|A|: |u' − u| ≤ σ gives |y' − y| ≤ Sσ.

    Self-loops of ReLU states are eliminated first, which is the same as keeping the sign of A's diagonal.

    Arguments:
        model: an `ImplicitModel` or `StateSpace` whose equation contracts, λ_pf(M) < 1; any φ of bounded slope.

    Returns:
        (q, p) float64, nonnegative, rounded upwards.

    Raises:
        ArgumentError: the equation is not known to contract.

    Source: El Ghaoui et al., Implicit Deep Learning (2021), §5, for slopes in [−1, 1].

    Example:
        >>> import torch
        >>> from implicitdl import StateSpace, certify
        >>> A, B, C = (torch.tensor([[value]], dtype=torch.float64) for value in (-0.5, 3.0, -2.0))
        >>> round(certify.sensitivity(StateSpace(A, B, C)).item(), 6)  # 2 · 3 / 1.5
        4.0
    """
    model = contractive("sensitivity", model)
    space = model.space
    moved = contained(model, (model.space.slopes.unsqueeze(1) * space.B.abs()).t())
    S = moved @ space.C.abs().t() + space.D.abs().t()
    return S.t() * (1 + model.rounding)


def contained(model: Contractive, w: Tensor) -> Tensor:
    """e ≥ (I − M)⁻¹w, (batch, n), for disturbances w ≥ 0 in rows.

    Every e ≥ 0 with Me + w ≤ e is one, since (I − M)⁻¹ ≥ 0; the solution of the linear system is widened until that is
    seen to hold with its rounding.
    """
    system = torch.eye(len(model.M), dtype=w.dtype, device=w.device) - model.M
    e = torch.linalg.solve(system, w.t()).t().clamp(min=0)

    def outside(wider: Tensor) -> Tensor:
        whole = e + wider
        return (whole @ model.M.t() + w) * (1 + model.rounding) - whole

    return e + model.widening(outside, len(w))


def around_center(model: Contractive, u: Box, solver: Solver | None) -> Box:
    """A box of states around that of the box's centre, of radius (I − M)⁻¹(G|B|ρ + the centre's own residual)."""
    space = model.space
    center = u.center
    x = space.state(center, solver=solver, on_failure="ignore")
    fx = space.activation.phi(space.pre_activation(x, center))
    gain = model.space.slopes
    size = x.abs() @ space.A.abs().t() + u.magnitude @ space.B.abs().t() + space.b_x.abs()
    disturbance = gain * (u.radius @ space.B.abs().t()) + (fx - x).abs()
    e = contained(model, disturbance + model.slack(gain * size + fx.abs() + x.abs()))
    return Box(x - e, x + e)


class Upper(NamedTuple):
    """Upper bounds of some functionals, (batch, m), and where a raw adjoint bound, if any, was above the interval's."""

    value: Tensor
    lost: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """How to bound affine functions of state and input over a box of inputs.

    Arguments:
        solver: solves the bound's own equilibria; `Auto()` by default.  Its accuracy decides how tight the bound is and
            never whether it is true.
    """

    solver: Solver | None = None

    @abstractmethod
    def uppers(self, model: Contractive, u: Box, of: Sequence[Functionals]) -> list[Upper]:
        """An upper bound of every functional, true for every input of the box."""


def in_boxes(model: Contractive, x: Box, u: Box, of: Functionals) -> Upper:
    """The bound of functionals when states and inputs vary freely in their boxes."""
    return Upper(of.upper(x, u) + model.slack(of.magnitude(x, u)))


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Method):
    """|x − x₀| ≤ (I − M)⁻¹G|B|ρ around the box's centre: the worst case of all inputs, for any φ of bounded slope.

    Source: El Ghaoui et al., Implicit Deep Learning (2021), §5; see `sensitivity`.
    """

    def uppers(self, model: Contractive, u: Box, of: Sequence[Functionals]) -> list[Upper]:
        x = around_center(model, u, self.solver)
        return [in_boxes(model, x, u, part) for part in of]
