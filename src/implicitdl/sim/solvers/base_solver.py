"""What every solver of state matching is: `solve` in the shape of the seeds, `fit` with a report for every row."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from ..._internal.errors import finite, fraction, non_negative, open_unit, real, settle, wrong
from ...activations import Activation, from_function
from ...equations.equilibrium import Equilibrium
from ...fixed_point import fixed_point
from ...solution import ImplicitFunctionWarning
from ...solvers import Auto
from ..certificate import RowReport, RowSolution, dual_gap
from ..problem import RowProblem
from .distributed import Future, in_batches, same_states

#: Told (rows done, rows in all); the rows of (A, B) come first, then those of (C, D).
Progress = Callable[[int, int], None]
Solved = tuple[Tensor, Tensor, Tensor, Tensor]
#: X, U, Z, Y.
Matrices = tuple[Tensor, Tensor, Tensor, Tensor]
# ‖A‖∞ ≤ 0.99 contracts by 1e-10 in 2,300 plain steps.
_REGENERATION_STEPS = 3000
# Rows of a batch: few enough that the iterates of all are small beside the Gram matrix, and progress is seen.
_ROWS = 500


class SIMWarning(ImplicitFunctionWarning):
    """Rows of state matching were not solved to the tolerance, or what was solved does not bound A."""


class ModelConfig(TypedDict, total=False):
    """What a solver is told of the model; every key may be left out.

    Keys:
        kappa: κ in (0, 1), the bound on ‖A‖∞; 0.99.
        activation_fn: φ, an `Activation` or a function; ReLU.  For `regen_states`, and for the one-sided solver.
        atol: absolute tolerance of the equilibria of `regen_states`; 1e-6.
        device: where the model is; solvers work where the states are.
    """

    kappa: float
    activation_fn: Activation | Callable[[Tensor], Tensor]
    atol: float
    device: torch.device | str


@dataclass(frozen=True, eq=False)
class SIMSolution:
    """What a solver found: Z ≈ AX + BU + b_x and Y ≈ CX + DU + b_y, in float64.  Unpacks as ``A, B, C, D``.

    Attributes:
        A, B, C, D: (n, n), (n, p), (q, n), (q, p).
        hidden: the report of the rows of (A, B).
        output: the report of the rows of (C, D).
        b_x, b_y: (n,) and (q,); None without intercepts.
        factors: (L, R) with A = LRᵀ, where the solver gives A in this form.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    hidden: RowReport
    output: RowReport
    b_x: Tensor | None = None
    b_y: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.A, self.B, self.C, self.D))

    def to(self, device: torch.device) -> SIMSolution:
        """The solution on another device."""
        moved: dict[str, Any] = {
            name: part.to(device) for name, part in vars(self).items() if isinstance(part, (Tensor, RowReport))
        }
        factors = None if self.factors is None else (self.factors[0].to(device), self.factors[1].to(device))
        return replace(self, **moved, factors=factors)


class BaseSolver(ABC):
    """Finds A, B, C, D with Z ≈ AX + BU, Y ≈ CX + DU and ‖A‖∞ ≤ κ from a teacher's states.

    A solver of one's own is a subclass with `solve`.  With attributes ``lambda_z`` and ``lambda_y`` it says which λ
    its rows minimise with, and gets the duality gap of every row in its report; without them the gap is infinite.

    Example:
        >>> import torch
        >>> from implicitdl.sim.solvers import BaseSolver
        >>> class Mine(BaseSolver):
        ...     def solve(self, X, U, Z, Y, model_config=None):
        ...         W = torch.linalg.lstsq(U.t(), torch.cat([Z, Y]).t()).solution.t()
        ...         A, C = torch.zeros(len(Z), len(X)), torch.zeros(len(Y), len(X))
        ...         return A, W[: len(Z)], C, W[len(Z) :]
        >>> X, U, Z, Y = torch.rand(3, 50), torch.rand(2, 50), torch.rand(3, 50), torch.rand(1, 50)
        >>> Mine().fit(X, U, Z, Y).hidden.norm
        tensor([0., 0., 0.], dtype=torch.float64)
    """

    #: Whether C and D are fitted to the states of the implicit model, once A and B are known, instead of the teacher's.
    regen_states: bool = False

    @abstractmethod
    def solve(self, X: Tensor, U: Tensor, Z: Tensor, Y: Tensor, model_config: ModelConfig | None = None) -> Solved:
        """A, B, C, D from states of shape (features, samples), last layer first.

        Arguments:
            X: post-activations (n, samples).
            U: inputs (p, samples).
            Z: pre-activations (n, samples).
            Y: outputs (q, samples).
            model_config: a `ModelConfig`, such as ``{"kappa": 0.95}``.

        Returns:
            A (n, n), B (n, p), C (q, n), D (q, p).

        Raises:
            ArgumentError: shapes that do not fit, a NaN or infinite state, κ outside (0, 1), an unknown key.
        """

    def fit(
        self,
        X: Tensor,
        U: Tensor,
        Z: Tensor,
        Y: Tensor,
        model_config: ModelConfig | None = None,
        *,
        intercept: bool = False,
        start: SIMSolution | None = None,
        progress: Progress | None = None,
    ) -> SIMSolution:
        """`solve` with a report, and with intercepts where asked for.

        Unpenalised intercepts are eliminated: the rows are solved on states whose mean over the samples is taken
        out, and b_x = z̄ − Ax̄ − Bū gives it back.

        Arguments:
            X, U, Z, Y, model_config: as for `solve`.
            intercept: whether there are b_x and b_y.
            start: a solution near by, such as that of another λ; for solvers that can start from one.
            progress: told the rows that are done and the rows in all.

        Returns:
            A `SIMSolution`, in float64, on the states' device.

        Raises:
            ArgumentError: as for `solve`.

        Warns:
            SIMWarning: rows missed the solver's tolerance.
        """
        states = (X, U, Z, Y)
        config = self._check(states, model_config, intercept)
        hidden, output, fitted_to = self._fit_rows(states, intercept, config, start, progress)
        found = SIMSolution(hidden.a, hidden.b, output.a, output.b, hidden.report, output.report)
        if not intercept:
            return found
        return replace(found, b_x=_intercept(hidden, X, U, Z), b_y=_intercept(output, fitted_to, U, Y))

    def _check(self, states: Matrices, model_config: Mapping[str, Any] | None, intercept: bool) -> ModelConfig:
        """The configuration with its defaults; an error where it or a state does not fit."""
        who, given = type(self).__name__, dict(model_config or {})
        if unknown := sorted(given.keys() - ModelConfig.__annotations__.keys()):
            raise wrong(who, f"model_config of {', '.join(ModelConfig.__annotations__)}", ", ".join(unknown))
        config = {"kappa": 0.99, "activation_fn": torch.relu, "atol": 1e-6, "device": states[0].device} | given
        open_unit(who, "kappa", config["kappa"])
        non_negative(who, "atol", config["atol"])
        X, _, Z, _ = states
        for name, matrix in zip("XUZY", states, strict=True):
            if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.is_floating_point():
                got = (
                    f"{tuple(matrix.shape)} of {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
                )
                raise wrong(who, f"{name} to be floating and of shape (features, samples)", got)
            if matrix.shape[1] != X.shape[1] or matrix.shape[1] == 0:
                do = "Columns are samples; transpose states whose rows are."
                raise wrong(who, f"{name} of shape (features, samples={X.shape[1]})", tuple(matrix.shape), do)
            finite(who, name, matrix)
        if Z.shape != X.shape:
            raise wrong(who, f"Z of X's shape {tuple(X.shape)}", tuple(Z.shape))
        return cast(ModelConfig, config)

    def _fit_rows(
        self,
        states: Matrices,
        intercept: bool,
        config: ModelConfig,
        start: SIMSolution | None,
        progress: Progress | None,
    ) -> tuple[RowSolution, RowSolution, Tensor]:
        """The rows of (A, B), those of (C, D), and the states (n, samples) that (C, D) was fitted to."""
        X, U, Z, Y = (_centred(matrix, intercept) for matrix in states)
        found = [torch.as_tensor(W, dtype=torch.float64, device=X.device) for W in self.solve(X, U, Z, Y, config)]
        shapes = [(len(Z), len(X)), (len(Z), len(U)), (len(Y), len(X)), (len(Y), len(U))]
        if (got := [tuple(W.shape) for W in found]) != shapes:
            raise wrong(f"{type(self).__name__}.solve", f"A, B, C, D of shapes {shapes}", got)
        A, B, C, D = found
        hidden = RowSolution(A, B, self._report(X, U, Z, torch.cat([A, B], dim=1), "lambda_z", config["kappa"]))
        output = RowSolution(C, D, self._report(X, U, Y, torch.cat([C, D], dim=1), "lambda_y", math.inf))
        if progress is not None:
            progress(len(Z) + len(Y), len(Z) + len(Y))
        return hidden, output, states[0]

    def _report(self, X: Tensor, U: Tensor, T: Tensor, w: Tensor, name: str, kappa: float) -> RowReport:
        """Certified where the solver says what it minimises."""
        lam = getattr(self, name, None)
        problem = RowProblem(X=X, U=U, T=T, lam=0.0 if lam is None else lam, kappa=kappa)
        report, _ = dual_gap(problem, w, tol=getattr(self, "tol", 0.0))
        return report if lam is not None else without_gap(report)


@dataclass(frozen=True, kw_only=True)
class RowSolver(BaseSolver):
    """Solvers that solve rows: those of (A, B) with ‖a‖₁ ≤ κ, and those of (C, D) without a bound.

    Arguments:
        regen_states: fit C and D to the equilibrium states of the A and B found, not to the teacher's.
        tol: the relative duality gap asked for.  Rows that miss it are warned about, and kept.
    """

    regen_states: bool = False
    tol: float = 1e-6

    def __post_init__(self) -> None:
        settle(self, fraction, "tol")

    @property
    def rows_at_once(self) -> int:
        """Most rows that `solve_rows` is given."""
        return _ROWS

    @property
    def bounded(self) -> bool:
        """Whether the rows of A are held to ‖a‖₁ ≤ κ."""
        return True

    def penalties(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(λ, μ) of the rows of (A, B), and of those of (C, D)."""
        return (0.0, 0.0), (0.0, 0.0)

    @abstractmethod
    def solve_rows(self, problem: RowProblem, start: RowSolution | None = None) -> RowSolution:
        """The rows of one problem, with their report.

        Arguments:
            problem: the data, λ and κ.
            start: a solution near by, or None.
        """

    def solve_hidden(self, problem: RowProblem, start: RowSolution | None = None) -> RowSolution:
        """`solve_rows` for rows of (A, B), where the solver treats them differently."""
        return self.solve_rows(problem, start)

    def _hidden(self, problem: RowProblem, start: RowSolution | None, on_progress: Callable[[int], None]) -> Future:
        return in_batches(self.solve_hidden, problem, start, self.rows_at_once, on_progress)

    def path(self, problem: RowProblem, lambdas: Iterable[float]) -> Iterator[RowSolution]:
        """Solutions for one λ after another, each started from the one before; give large λ first."""
        start = None
        for lam in lambdas:
            start = self.solve_rows(problem.replace(lam=lam), start)
            yield start

    def solve(self, X: Tensor, U: Tensor, Z: Tensor, Y: Tensor, model_config: ModelConfig | None = None) -> Solved:
        X, U, Z, Y = (M if isinstance(M, Tensor) else torch.as_tensor(M, device="cpu") for M in (X, U, Z, Y))
        A, B, C, D = self.fit(X, U, Z, Y, model_config)
        return A, B, C, D

    def _check(self, states: Matrices, model_config: Any, intercept: bool) -> ModelConfig:
        config = super()._check(states, model_config, intercept)
        same_states(type(self).__name__, states)
        return config

    def _fit_rows(
        self,
        states: Matrices,
        intercept: bool,
        config: ModelConfig,
        start: SIMSolution | None,
        progress: Progress | None,
    ) -> tuple[RowSolution, RowSolution, Tensor]:
        who, done, total = type(self).__name__, 0, len(states[2]) + len(states[3])

        def on_progress(rows: int) -> None:
            nonlocal done
            done = min(done + rows, total)
            if progress is not None:
                progress(done, total)

        X, U, Z, Y = (_centred(matrix, intercept) for matrix in states)
        (lam, ridge), (lam_y, ridge_y) = self.penalties()
        kappa = config["kappa"] if self.bounded else math.inf
        problem = RowProblem(X=X, U=U, T=Z, lam=lam, ridge=ridge, kappa=kappa)
        before = None if start is None else RowSolution(start.A, start.B, start.hidden)
        pending, fitted_to = self._hidden(problem, before, on_progress), states[0]
        if self.regen_states:
            hidden = pending.result()
            b_x = _intercept(hidden, *states[:3]) if intercept else None
            fitted_to = regenerated(hidden.a, hidden.b, b_x, states[1], config)
            problem = RowProblem(X=_centred(fitted_to, intercept), U=U, T=Y, lam=lam_y, ridge=ridge_y)
        else:
            problem = problem.replace(T=Y, lam=lam_y, ridge=ridge_y, kappa=math.inf)
        before = None if start is None else RowSolution(start.C, start.D, start.output)
        output = in_batches(self.solve_rows, problem, before, self.rows_at_once, on_progress).result()
        hidden = pending.result()
        for name, part in (("(A, B)", hidden), ("(C, D)", output)):
            warn_missed(who, name, part.report, self.tol)
        if not self.bounded:
            warn_unbounded(who, hidden.report, config["kappa"])
        return hidden, output, fitted_to


@dataclass(frozen=True, kw_only=True)
class PenalisedSolver(RowSolver):
    """Row solvers of

        min ½‖z − Xᵀa − Uᵀb‖² + λ(‖a‖₁ + ‖b‖₁)   subject to  ‖a‖₁ ≤ κ

    Arguments:
        lambda_z: λ of the rows of (A, B).
        lambda_y: λ of the rows of (C, D).
        elastic_net: penalise with λ(l1_ratio ‖w‖₁ + ½(1 − l1_ratio)‖w‖²) instead.
        l1_ratio: the share of the ℓ1 norm in an elastic net, in (0, 1].
        regen_states, tol: as for `RowSolver`.
    """

    lambda_z: float = 1e-6
    lambda_y: float = 1e-6
    elastic_net: bool = False
    l1_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, non_negative, "lambda_z", "lambda_y")
        if not 0.0 < real(self.l1_ratio) <= 1.0:
            raise wrong(type(self).__name__, "0 < l1_ratio ≤ 1", repr(self.l1_ratio))
        object.__setattr__(self, "l1_ratio", float(self.l1_ratio))

    def penalties(self) -> tuple[tuple[float, float], tuple[float, float]]:
        share = self.l1_ratio if self.elastic_net else 1.0
        z, y = self.lambda_z, self.lambda_y
        return (share * z, (1 - share) * z), (share * y, (1 - share) * y)


def _centred(matrix: Tensor, intercept: bool) -> Tensor:
    """The states less their means over the samples, in float64; as they are where no intercept takes the means up."""
    if not intercept:
        return matrix
    wide = matrix.double()
    return wide - wide.mean(dim=1, keepdim=True)


def _intercept(found: RowSolution, X: Tensor, U: Tensor, T: Tensor) -> Tensor:
    """t̄ − Ax̄ − Bū."""
    x, u, t = (matrix.double().mean(dim=1) for matrix in (X, U, T))
    return t - found.a @ x - found.b @ u


def regenerated(A: Tensor, B: Tensor, b_x: Tensor | None, U: Tensor, config: ModelConfig) -> Tensor:
    """The equilibrium states (n, samples) of x = φ(Ax + Bu + b_x), in float64."""
    phi = config["activation_fn"]
    activation = phi if isinstance(phi, Activation) else from_function(phi)
    b = torch.nn.functional.linear(U.t().double(), B, b_x)
    solver = Auto(atol=config["atol"], max_steps=_REGENERATION_STEPS)
    with torch.no_grad():
        states = fixed_point(Equilibrium(A, b, activation), torch.zeros_like(b), solver=solver).value
    return states.t()  # type: ignore[union-attr]


def without_gap(report: RowReport) -> RowReport:
    """The report of rows of which no bound is known."""
    return replace(report, gap=torch.full_like(report.gap, math.inf), converged=torch.zeros_like(report.converged))


def warn_missed(who: str, name: str, report: RowReport, tol: float) -> None:
    """Say how many rows missed the tolerance."""
    open_ = ~report.converged & report.gap.isfinite()  # an infinite gap was never promised to close
    if missed := int(open_.sum()):
        worst = float(report.relative_gap[open_].max())
        warnings.warn(
            f"{who}: {missed} of {len(report.gap)} rows of {name} did not reach a relative duality gap of {tol:g} "
            f"(worst {worst:.1e}). Their report says by how much.",
            SIMWarning,
            stacklevel=4,
        )


def warn_unbounded(who: str, report: RowReport, kappa: float) -> None:
    """Say that nothing makes the model well posed."""
    if (norm := float(report.norm.max())) > kappa:
        warnings.warn(
            f"{who}: ‖A‖∞ = {norm:.3g} is above κ = {kappa:g} by {norm - kappa:.2g}: the model need not have an "
            "equilibrium. Check certify.well_posed(model), or use ADMMSolver().",
            SIMWarning,
            stacklevel=4,
        )
