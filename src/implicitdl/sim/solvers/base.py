"""What every solver of state matching is: `solve` in the shape of the seeds, `fit` with a report for every row."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from ..._internal.errors import finite, non_negative, open_unit, wrong
from ...activations import Activation, from_function
from ...equations.equilibrium import Equilibrium
from ...fixed_point import fixed_point
from ...solvers import Auto
from ..certificate import certify
from ..problem import RowProblem
from ..solution import RowReport, SIMSolution, SIMWarning

#: Told (rows done, rows in all); the rows of (A, B) come first, then those of (C, D).
Progress = Callable[[int, int], None]
Solved = tuple[Tensor, Tensor, Tensor, Tensor]
# ‖A‖∞ ≤ 0.99 contracts by 1e-10 in 2,300 plain steps.
_REGENERATION_STEPS = 3000


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
        config = checked(type(self).__name__, (X, U, Z, Y), model_config)
        (X, U, Z, Y), means = centred((X, U, Z, Y), intercept)
        A, B, C, D = (torch.as_tensor(W, dtype=torch.float64, device=X.device) for W in self.solve(X, U, Z, Y, config))
        shapes = [(len(Z), len(X)), (len(Z), len(U)), (len(Y), len(X)), (len(Y), len(U))]
        if [tuple(W.shape) for W in (A, B, C, D)] != shapes:
            got = [tuple(W.shape) for W in (A, B, C, D)]
            raise wrong(f"{type(self).__name__}.solve", f"A, B, C, D of shapes {shapes}", got)
        hidden = self._report(X, U, Z, torch.cat([A, B], dim=1), "lambda_z", config["kappa"])
        output = self._report(X, U, Y, torch.cat([C, D], dim=1), "lambda_y", math.inf)
        if progress is not None:
            progress(len(Z) + len(Y), len(Z) + len(Y))
        return with_intercepts(SIMSolution(A, B, C, D, hidden, output), means)

    def _report(self, X: Tensor, U: Tensor, T: Tensor, w: Tensor, name: str, kappa: float) -> RowReport:
        """Certified where the solver says what it minimises."""
        lam = getattr(self, name, None)
        problem = RowProblem(X=X, U=U, T=T, lam=0.0 if lam is None else lam, kappa=kappa)
        report, _ = certify(problem, w, tol=getattr(self, "tol", 0.0))
        return report if lam is not None else without_gap(report)


def without_gap(report: RowReport) -> RowReport:
    """The report of rows of which no bound is known."""
    return RowReport(
        report.objective, torch.full_like(report.gap, math.inf), report.norm, report.support, report.rounding,
        torch.zeros_like(report.converged),
    )  # fmt: skip


def checked(who: str, states: tuple[Tensor, ...], model_config: ModelConfig | Mapping[str, Any] | None) -> ModelConfig:
    """The configuration with its defaults; an error where it or a state does not fit."""
    given = dict(model_config or {})
    if unknown := sorted(given.keys() - ModelConfig.__annotations__.keys()):
        raise wrong(who, f"model_config of {', '.join(ModelConfig.__annotations__)}", ", ".join(unknown))
    config = {"kappa": 0.99, "activation_fn": torch.relu, "atol": 1e-6, "device": states[0].device} | given
    open_unit(who, "kappa", config["kappa"])
    non_negative(who, "atol", config["atol"])
    X, _, Z, _ = states
    for name, matrix in zip("XUZY", states, strict=True):
        if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.is_floating_point():
            got = f"{tuple(matrix.shape)} of {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise wrong(who, f"{name} to be floating and of shape (features, samples)", got)
        if matrix.shape[1] != X.shape[1] or matrix.shape[1] == 0:
            do = "Columns are samples; transpose states whose rows are."
            raise wrong(who, f"{name} of shape (features, samples={X.shape[1]})", tuple(matrix.shape), do)
        finite(who, name, matrix)
    if Z.shape != X.shape:
        raise wrong(who, f"Z of X's shape {tuple(X.shape)}", tuple(Z.shape))
    return cast(ModelConfig, config)


def centred(states: tuple[Tensor, ...], intercept: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """The states less their means, in float64, and the means (features,); or the states as they are, and None."""
    if not intercept:
        return states, None
    wide = tuple(matrix.double() for matrix in states)
    means = tuple(matrix.mean(dim=1) for matrix in wide)
    return tuple(matrix - mean.unsqueeze(1) for matrix, mean in zip(wide, means, strict=True)), means


def with_intercepts(
    solution: SIMSolution, means: tuple[Tensor, ...] | None, x_output: Tensor | None = None
) -> SIMSolution:
    """b_x = z̄ − Ax̄ − Bū and b_y = ȳ − Cx̄ − Dū, where (C, D) may have seen states of another mean."""
    if means is None:
        return solution
    x, u, z, y = means
    A, B, C, D = solution
    b_y = y - C @ (x if x_output is None else x_output) - D @ u
    return SIMSolution(A, B, C, D, solution.hidden, solution.output, z - A @ x - B @ u, b_y, solution.factors)


def regenerated(A: Tensor, B: Tensor, b_x: Tensor | None, U: Tensor, config: ModelConfig) -> Tensor:
    """The equilibrium states (n, samples) of x = φ(Ax + Bu + b_x), in float64."""
    phi = config["activation_fn"]
    activation = phi if isinstance(phi, Activation) else from_function(phi)
    b = torch.nn.functional.linear(U.t().double(), B, b_x)
    solver = Auto(atol=config["atol"], max_steps=_REGENERATION_STEPS)
    with torch.no_grad():
        states = fixed_point(Equilibrium(A, b, activation), torch.zeros_like(b), solver=solver).value
    return states.t()  # type: ignore[union-attr]


def warn_missed(who: str, name: str, report: RowReport, tol: float) -> None:
    """Say how many rows missed the tolerance."""
    open_ = ~report.converged & report.gap.isfinite()  # an infinite gap was never promised to close
    if missed := int(open_.sum()):
        worst = float(report.take(open_).relative_gap.max())
        warnings.warn(
            f"{who}: {missed} of {len(report.gap)} rows of {name} did not reach a relative duality gap of {tol:g} "
            f"(worst {worst:.1e}). Their report says by how much.",
            SIMWarning,
            stacklevel=3,
        )


def warn_unbounded(who: str, report: RowReport, kappa: float) -> None:
    """Say that nothing makes the model well posed."""
    if (norm := float(report.norm.max())) > kappa:
        warnings.warn(
            f"{who}: ‖A‖∞ = {norm:.3g} is above κ = {kappa:g} by {norm - kappa:.2g}: the model need not have an "
            "equilibrium. Check certify.well_posed(model), or use ADMMSolver().",
            SIMWarning,
            stacklevel=3,
        )
