"""State matching in the units in which the teacher is feasible: from states to a solver, and back to a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._internal.errors import finite, shown, wrong
from ..activations import Activation
from ..constraints import Constraint, LowRank, RowScaling, Unconstrained, WeightedRowScaling
from ..nn import ImplicitModel
from ..statespace import StateSpace, perron_root, perron_weights
from ..statespace.refit import RowFit
from ..training.evaluate import evaluating
from .certificate import RowReport
from .recorder import Recorder
from .solvers import BaseSolver, ModelConfig
from .solvers.base_solver import Progress, SIMSolution, SIMWarning
from .states import Columns, Layer, States, place_of

# Samples that are rescaled at a time.
_CHUNK = 4096
# Samples on which X = φ(Z) is checked, and how far a teacher in half precision may be from it, relative to max |x|.
_CHECKED, _CLOSE = 1000, 1e-2


@dataclass(frozen=True)
class SIMReport:
    """How well each row of a SIM was solved, in the units that it was solved in.

    Attributes:
        hidden: a `RowReport` of the rows of (A, B): objective, gap, ‖a‖₁, support, converged, each (n,).
        output: the same of the rows of (C, D), each (q,).
        weights: v (n,), the units of the states; None where they were left as they are.
        layers: whose states the rows of A are, in their order.
        nonzeros: of A, B, C and D together.
        norm: max_i Σ_j |a_ij| v_j / v_i, at most κ / max(1, max|φ'|) unless the solver does not promise it; v is 1
            where the model keeps the scaled states.
        samples: m.
    """

    hidden: RowReport
    output: RowReport
    weights: Tensor | None
    layers: tuple[Layer, ...]
    nonzeros: int
    norm: float
    samples: int

    def facts(self) -> list[tuple[str, str]]:
        """What to tell of it, name and words."""
        missed = sum(int((~part.converged).sum()) for part in (self.hidden, self.output))
        total = sum(len(part.converged) for part in (self.hidden, self.output))
        gap = max(float(part.relative_gap.max()) for part in (self.hidden, self.output))
        units = "as they are" if self.weights is None else f"in units of 1 to {float(self.weights.max()):.4g}"
        return [
            ("rows converged", f"{total - missed} of {total}, worst relative gap {gap:.1e}"),
            ("states", f"{sum(layer.features for layer in self.layers)} of {self.samples:,} samples, {units}"),
            ("‖A‖∞", f"{self.norm:.9g}"),
            ("nonzeros", f"{self.nonzeros:,}"),
        ]

    def __str__(self) -> str:
        return shown("; ".join(f"{name}: {words}" for name, words in self.facts()))


@dataclass(frozen=True, eq=False)
class StateMatching:
    """Z ≈ AX + BU + b_x and Y ≈ CX + DU + b_y, with Σⱼ|aᵢⱼ|vⱼ ≤ r vᵢ.

    In the units x̃ = x/v, z̃ = z/v the set is the plain ball ‖ã‖₁ ≤ r, which is what solvers know.  A positively
    homogeneous φ has φ(z)/v = φ(z/v): the model keeps those units.  Any other φ̃(z̃) = φ(v z̃)/v is a function of its
    own for every state, and the solution is brought back, A = SÃS⁻¹, B = SB̃, C = C̃S⁻¹ with S = diag(v).

    Attributes:
        states: X, U, Z, Y (features, samples) in the new units.
        activation: φ.
        kappa: κ.
        radius: r = κ / max(1, max|φ'|).  A φ of smaller slope would allow a larger ball, and ‖A‖∞ ≤ κ is asked for.
        weights: v (n,) in float64; None where the states keep their units.
        intercept: whether there are b_x and b_y.
        dtype, device: of the model; it is solved there, in float64.
        layers: whose states the rows of X are.
    """

    states: Mapping[str, Tensor]
    activation: Activation
    kappa: float
    radius: float
    weights: Tensor | None
    intercept: bool
    dtype: torch.dtype
    device: torch.device
    layers: tuple[Layer, ...]

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

    def model(self, found: SIMSolution) -> tuple[ImplicitModel, SIMReport]:
        """The solution as a model, whose constraint leaves its A as it is, and its report."""
        A, B, C, D = found.A, found.B, found.C, found.D
        finite("SIM", "weights from the solver", torch.cat([A.flatten(), B.flatten(), C.flatten(), D.flatten()]))
        v = self.weights
        b_x, b_y = found.b_x, found.b_y
        if not self.keeps_units:
            assert v is not None
            v = v.to(A)
            A, B, C = v[:, None] * A / v, v[:, None] * B, C / v
            b_x = None if b_x is None else v * b_x
        constraint = self._constraint(A, found).to(self.device, self.dtype)
        A, B, C, D = (part.to(self.dtype) for part in (A, B, C, D))
        biases = {name: b.to(self.dtype) for name, b in (("b_x", b_x), ("b_y", b_y)) if b is not None}
        bias = any(bool((b != 0).any()) for b in biases.values())
        rank = constraint.rank if isinstance(constraint, LowRank) else None
        if rank is None:
            A = _inside(constraint, A)
            weights = {"A": A}
        else:
            weights = dict(zip("LR", constraint.right_inverse(A), strict=True))
            A = constraint(**weights)
        model = ImplicitModel(
            B.shape[1], len(C), len(A), bias=bias, is_low_rank=rank is not None, rank=rank,
            activation=self.activation, constraint=constraint, device=self.device, dtype=self.dtype,
        )  # fmt: skip
        weights |= {"B": B, "C": C, "D": D} | (biases if bias else {})
        model.load_state_dict(model.state_dict() | weights)
        return model, self._report(found, constraint, (A, B, C, D))

    def _report(self, found: SIMSolution, constraint: Constraint, matrices: tuple[Tensor, ...]) -> SIMReport:
        size = matrices[0].double().abs()
        if isinstance(constraint, WeightedRowScaling) and constraint.weights is not None:
            v = constraint.weights.to(size)
            size = size * v / v[:, None]
        return SIMReport(
            hidden=found.hidden,
            output=found.output,
            weights=self.weights,
            layers=self.layers,
            nonzeros=sum(int((part != 0).sum()) for part in matrices),
            norm=float(size.sum(dim=1).max()),
            samples=self.states["U"].shape[1],
        )

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


def _inside(constraint: Constraint, A: Tensor) -> Tensor:
    """A with the rows that rounding has left outside shrunk: inside as computed in its own dtype, and in float64."""
    A = A.clone()
    while True:
        wide = A.double()
        outside = ((constraint(A) != A) | (constraint(wide) != wide)).any(dim=1)
        if not bool(outside.any()):
            return A
        A[outside] *= 1 - torch.finfo(A.dtype).eps


def scaled_states(states: Mapping[str, Tensor], v: Tensor | None, max_memory: int) -> Mapping[str, Tensor]:
    """X/v and Z/v beside U and Y; on disk where they are larger than `max_memory`."""
    if v is None or bool((v == 1).all()):
        return states
    with Columns(None, max_memory) as columns:
        for name in "XZ":
            for rows in states[name].t().split(_CHUNK):
                columns.append(name, rows / v.to(rows))
        return {**states, **columns.finish()}


def teacher_weights(
    model: nn.Module,
    batch_shape: Sequence[int],
    kappa: float,
    *,
    layers: Sequence[str | int] | None = None,
    skip_layers: int | None = None,
) -> Tensor | None:
    """The least v ≥ 1 with |A|v ≤ κv for the A that a teacher is, without forming it.

    A network that is linear between its activations has a strictly block triangular A, and v = max(1, |A|v/κ) is
    found by one pass through it: with the absolute values of its parameters, with activations that are z ↦ max(1, z/κ),
    and with a zero input.  Biases do not belong to A: what they add is what a second sample shows, whose activations
    are zero.

    Arguments:
        model: the teacher.
        batch_shape: of a batch of its inputs.
        kappa: κ.
        layers, skip_layers: as for `get_states`.

    Returns:
        (n,) float64 in the order of the states; None where a pass does not tell: a scripted network, one with an
        implicit model inside or with states that are not finite, an implicit model with λ_pf(|A|) ≥ κ.

    Source: THEORY §1.2; `perron_weights` for a matrix.

    Example:
        >>> import torch
        >>> from implicitdl.sim.matching import teacher_weights
        >>> teacher = torch.nn.Sequential(
        ...     torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU()
        ... )
        >>> _ = teacher[1].weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> teacher_weights(teacher, (1, 2), kappa=0.5)
        tensor([8., 1., 1.], dtype=torch.float64)
    """
    if isinstance(model, ImplicitModel):
        A = model.statespace().A.detach().double().cpu()
        if RowScaling(kappa).contains(A.to(model.B.dtype)):
            return torch.ones(len(A), dtype=A.dtype, device=A.device)
        return perron_weights(A, kappa) if perron_root(A) < kappa else None
    if isinstance(model, torch.jit.ScriptModule) or any(isinstance(part, ImplicitModel) for part in model.modules()):
        return None

    def replaced(z: Tensor) -> Tensor:
        x = torch.zeros_like(z)
        x[0] = ((z[0] - z[-1]).abs() / kappa).clamp(min=1.0)
        return x

    device, dtype = place_of(model)
    zeros = torch.zeros(max(2, batch_shape[0]), *batch_shape[1:], device=device, dtype=dtype)
    absolute = {name: parameter.abs() for name, parameter in model.named_parameters()}
    recorder = Recorder(model, layers, replaced)
    with evaluating(model), recorder.recording():
        functional_call(model, absolute, (zeros,))
    v = torch.cat([replaced(call.z)[0].flatten() for call in recorder.chosen(skip_layers)[::-1]]).to(
        "cpu", torch.float64
    )
    return v if bool(torch.isfinite(v).all()) else None


def check_states(states: States, activation: Activation) -> None:
    """Refuse a layer that is not φ: no A and B make the implicit model's states the teacher's.  Warn of dead ones."""
    start = 0
    for layer in states.layers:
        rows = slice(start, start := start + layer.features)
        x, z = states["X"][rows, :_CHECKED], states["Z"][rows, :_CHECKED]
        off = float((activation.phi(z) - x).abs().max())
        if off > _CLOSE * max(float(x.abs().max()), torch.finfo(x.dtype).tiny):
            raise wrong(
                "SIM.train", f"x = φ(z) with φ = {activation.name} in every layer",
                f"a difference of {off:.3g} in {layer}", "Pass its activation_fn, or choose layers=[...].",
            )  # fmt: skip
        x = states["X"][rows]
        if x.shape[1] > 1 and bool((x == x[:, :1]).all()):
            warnings.warn(
                f"SIM.train: all {layer.features} states of {layer} are the same for every sample: the teacher does "
                "not use its input there. Train it again, from other weights or with a lower learning rate.",
                SIMWarning, stacklevel=4,
            )  # fmt: skip
