"""State matching in the units in which the teacher is feasible: from states to a solver, and from its solution back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._internal.errors import finite
from ..activations import Activation
from ..constraints import Constraint, LowRank, RowScaling, Unconstrained, WeightedRowScaling
from ..nn import ImplicitModel
from ..statespace import StateSpace
from ..statespace.refit import RowFit
from .solution import SIMSolution, SIMWarning
from .solvers import BaseSolver, ModelConfig
from .storage import Columns, Layer

# Samples that are rescaled at a time.
_CHUNK = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Matching:
    """Z ≈ AX + BU + b_x and Y ≈ CX + DU + b_y, with Σⱼ|aᵢⱼ|vⱼ ≤ r vᵢ.

    In the units x̃ = x/v, z̃ = z/v the set is the plain ball ‖ã‖₁ ≤ r, which is what solvers know.  A positively
    homogeneous φ has φ(z)/v = φ(z/v): the model keeps those units.  Any other φ̃(z̃) = φ(v z̃)/v is a function of its
    own for every state, and the solution is brought back, A = SÃS⁻¹, B = SB̃, C = C̃S⁻¹ with S = diag(v).

    Attributes:
        states: X, U, Z, Y (features, samples) in the new units.
        activation: φ.
        kappa: κ; r = κ / max(1, max|φ'|).
        weights: v (n,) in float64; None where the states keep their units.
        intercept: whether there are b_x and b_y.
        dtype, device: of the model; it is solved there, in float64.
        layers: whose states the rows of X are.
    """

    states: Mapping[str, Tensor]
    activation: Activation
    kappa: float
    weights: Tensor | None
    intercept: bool
    dtype: torch.dtype
    device: torch.device
    layers: tuple[Layer, ...]

    @property
    def radius(self) -> float:
        # A φ of smaller slope would allow a larger ball, and ‖A‖∞ ≤ κ is what is asked for.
        return self.kappa / max(1.0, self.activation.lipschitz)

    @property
    def keeps_units(self) -> bool:
        """Whether the model lives in the scaled units."""
        return self.weights is None or self.activation.homogeneous

    def fit(
        self, solver: BaseSolver, start: SIMSolution | None = None, progress: Progress | None = None
    ) -> SIMSolution:
        """The rows that `solver` finds, in the scaled units."""
        X, U, Z, Y = (self.states[name].to(self.device) for name in "XUZY")
        config: ModelConfig = {"kappa": self.radius, "activation_fn": self._scaled_activation(), "device": self.device}
        return solver.fit(X, U, Z, Y, config, intercept=self.intercept, start=start, progress=progress)

    def model(self, found: SIMSolution) -> ImplicitModel:
        """The solution as a model, whose constraint leaves its A as it is."""
        A, B, C, D = found
        finite("SIM", "weights from the solver", torch.cat([A.flatten(), B.flatten(), C.flatten(), D.flatten()]))
        v = self.weights
        b_x, b_y = found.b_x, found.b_y
        if not self.keeps_units:
            assert v is not None
            v = v.to(A)
            A, B, C = v[:, None] * A / v, v[:, None] * B, C / v
            b_x = None if b_x is None else v * b_x
        constraint = self._constraint(A, found).to(self.device, self.dtype)
        A = _inside(constraint, A.to(self.dtype))
        B, C, D = (part.to(self.dtype) for part in (B, C, D))
        b_x, b_y = (None if part is None else part.to(self.dtype) for part in (b_x, b_y))
        space = StateSpace(A, B, C, D, b_x, b_y, blocks=self.activation)
        return ImplicitModel.from_statespace(space, constraint=constraint)

    def refitted(self, found: SIMSolution) -> SIMSolution:
        """Least squares on the weights that are not zero, without the penalty that has made the others so.

        Rows of (A, B) stay in the ball; (C, D) is fitted to the states of the model that they make.
        """
        X, U, Z, Y = (self.states[name].to(self.device, torch.float64).t() for name in "XUZY")
        A, B, b_x = RowFit(found.A, found.B, self.intercept, self.radius).to(Z, X, U)
        x = StateSpace(A, B, found.C, b_x=b_x, blocks=self._scaled_activation()).solve(U).value
        assert isinstance(x, Tensor)
        C, D, b_y = RowFit(found.C, found.D, self.intercept, torch.inf).to(Y, x, U)
        fitted = replace(found, A=A, B=B, C=C, D=D)
        return replace(fitted, b_x=b_x, b_y=b_y) if self.intercept else fitted

    def _constraint(self, A: Tensor, found: SIMSolution) -> Constraint:
        kappa, slope = self.kappa, max(1.0, self.activation.lipschitz)
        weights = None if self.keeps_units else self.weights
        ball = RowScaling(kappa, slope) if weights is None else WeightedRowScaling(kappa, slope, weights.to(A))
        if not ball.contains(A):
            warnings.warn(
                f"SIM: the solver's A is not inside the ball of κ = {kappa:g}. The model has it as it is, without a "
                "constraint: see certify.well_posed(model).",
                SIMWarning, stacklevel=4,
            )  # fmt: skip
            return Unconstrained(kappa, slope)
        return ball if found.factors is None else LowRank(kappa, slope, rank=found.factors[0].shape[1])

    def _scaled_activation(self) -> Activation:
        if self.keeps_units:
            return self.activation
        assert self.weights is not None
        v, phi, dphi = self.weights.to(self.device), self.activation.phi, self.activation.dphi
        return Activation(
            self.activation.name, lambda z: phi(z * v.to(z.dtype)) / v.to(z.dtype), lambda z: dphi(z * v.to(z.dtype)),
            self.activation.slope,
        )  # fmt: skip


def in_units(states: Mapping[str, Tensor], v: Tensor | None, max_memory: int) -> Mapping[str, Tensor]:
    """X/v and Z/v beside U and Y; on disk where they are larger than `max_memory`."""
    if v is None or bool((v == 1).all()):
        return states
    with Columns(None, max_memory) as columns:
        for name in "XZ":
            for rows in states[name].t().split(_CHUNK):
                columns.append(name, rows / v.to(rows))
        return {**states, **columns.finish()}


def _inside(constraint: Constraint, A: Tensor) -> Tensor:
    """A with the rows that rounding has left outside shrunk: inside as computed in its own dtype, and in float64."""
    if isinstance(constraint, LowRank):
        return A  # its factors are found anew
    A = A.clone()
    while True:
        wide = A.double()
        outside = ((constraint(A) != A) | (constraint(wide) != wide)).any(dim=1)
        if not bool(outside.any()):
            return A
        A[outside] *= 1 - torch.finfo(A.dtype).eps
