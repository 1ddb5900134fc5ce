"""Operator splitting for monotone models: one solution for every A with I − A ⪰ mI, however large A is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._internal.errors import positive, positive_int, settle, wrong
from ..equations.map import Map, Splittable
from .base import Solver
from .state import Rows


@dataclass(slots=True)
class _Split(Rows):
    alpha: float
    z: Tensor  # (batch, d)  Ay + b at the point last evaluated


@dataclass(frozen=True, kw_only=True)
class Splitting(Solver):
    """What the two methods share: the maps they serve, the step α, and f evaluated through its pre-activation.

    Arguments:
        alpha: the step.
        rtol, atol, max_steps: as for `Solver`.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive, "alpha")

    def serves(self, f: Map) -> bool:
        return isinstance(f, Splittable)

    def needs(self, f: Map) -> tuple[str, str, str]:
        return (
            "a map φ(Ax + b) of known A, such as an Equilibrium, or the adjoint of one", "one of unknown structure",
            "Pass Equilibrium(A, b, φ), or use another solver, such as Newton() or Anderson().",
        )  # fmt: skip

    def init(self, f: Any, x: Tensor) -> _Split:
        return self.start(f, self.alpha or self.default_step(f), x)

    @abstractmethod
    def default_step(self, f: Splittable) -> float:
        """α for this map."""

    def start(self, f: Splittable, alpha: float, x: Tensor) -> _Split:
        return _Split(alpha, x)

    def evaluate(self, f: Any, x: Tensor, state: _Split) -> Tensor:
        state.z = f.affine(f.inner(x))
        fx: Tensor = f.prox(state.z, 1.0)
        return fx


@dataclass(frozen=True, kw_only=True)
class ForwardBackward(Splitting):
    """y ← prox_αf(y − α((I − A)y − b)) for x = φ(Ax + b), φ = prox_f and I − A ⪰ mI.

    One evaluation of f a step.  With L = ‖I − A‖₂ it converges for α < 2m/L², by a factor of √(1 − m²/L²) at
    α = m/L²: slow where A is large, and then `PeacemanRachford` is the better choice.  α = 1 is plain iteration.

    It serves an `Equilibrium` with a positively homogeneous φ such as ReLU, and the adjoint of one.

    Arguments:
        alpha: the step α; by default m/L², from the eigenvalues of A.
        rtol, atol, max_steps: as for `Solver`.

    Source: Winston & Kolter, Monotone operator equilibrium networks (2020), §3 and appendix; Ryu & Boyd, A primer on
    monotone operator methods (2016).

    Example:
        >>> import torch
        >>> from implicitdl import Equilibrium, ForwardBackward, fixed_point
        >>> f = Equilibrium(torch.tensor([[-3.0, 2.0], [-2.0, 0.0]]), torch.ones(1, 2))
        >>> bool(fixed_point(f, torch.zeros(1, 2), solver=ForwardBackward()).converged)
        True
    """

    def default_step(self, f: Splittable) -> float:
        if not f.any_step:
            raise wrong(
                "ForwardBackward", "a positively homogeneous activation, such as RELU", f.name,
                "Use PeacemanRachford(), which takes alpha=1 then.",
            )  # fmt: skip
        m, L = f.bounds()
        if m <= 0:
            raise wrong(
                "ForwardBackward", "I − A ⪰ mI with m > 0", f"m={m:.3g}",
                "Set alpha, or use a solver that needs no monotonicity, such as Newton().",
            )  # fmt: skip
        return m / L**2

    def step(self, f: Any, x: Tensor, fx: Tensor, state: _Split) -> tuple[Tensor, _Split, int]:
        alpha = state.alpha
        return f.prox(torch.lerp(f.inner(x), state.z, alpha), alpha), state, 0


@dataclass(slots=True)
class _Reflected(_Split):
    resolvent: Callable[[Tensor], Tensor]
    u: Tensor | None  # (batch, d)  y = prox_αf(u)
    left: int  # evaluations and products that the budget allows after the present one


@dataclass(frozen=True, kw_only=True)
class PeacemanRachford(Splitting):
    """Reflections in turn for x = φ(Ax + b), φ = prox_f and I − A ⪰ mI: u ← 2R(ū + αb) − ū, ū = 2 prox_αf(u) − u.

    R = (I + α(I − A))⁻¹ is inverted once a solve.  It converges for every α > 0, by a factor of √(1 − 4αm/(1 + αL)²),
    L = ‖I − A‖₂, and needs no contraction: A may be as large as it likes.

    A product with R costs what an evaluation of f costs, and is counted as one; f itself is evaluated only to look at
    the residual, every ``sweeps`` products.

    It serves an `Equilibrium` and the adjoint of one; α ≠ 1 needs a positively homogeneous φ such as ReLU.

    Arguments:
        alpha: the step α; by default 3/L where φ is positively homogeneous, else 1.
        sweeps: products with R from one look at the residual to the next.
        rtol, atol, max_steps: as for `Solver`.

    Source: Winston & Kolter, Monotone operator equilibrium networks (2020), §3; rates from Ryu & Boyd, A primer on
    monotone operator methods (2016).

    Example:
        >>> import torch
        >>> from implicitdl import Equilibrium, PeacemanRachford, fixed_point
        >>> f = Equilibrium(torch.tensor([[0.0, 5.0], [-5.0, 0.0]]), torch.ones(1, 2))
        >>> bool(fixed_point(f, torch.zeros(1, 2), solver=PeacemanRachford()).converged)
        True
    """

    sweeps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, positive_int, "sweeps")

    def default_step(self, f: Splittable) -> float:
        # The bound is best at 1/L, and at 3/L its exponent is a quarter smaller; the sweeps are fewer all the same
        # unless I − A is nearly the identity, since the worst case is not met (the tests compare the two).
        return 3 / f.bounds()[1] if f.any_step else 1.0

    def start(self, f: Splittable, alpha: float, x: Tensor) -> _Reflected:
        return _Reflected(alpha, x, f.resolvent(alpha), None, self.max_steps - 1)

    def step(self, f: Any, x: Tensor, fx: Tensor, state: _Reflected) -> tuple[Tensor, _Reflected, int]:
        alpha, y = state.alpha, f.inner(x)
        sweeps = min(self.sweeps, state.left - 1)
        if sweeps < 1:
            return fx, state, 0  # the budget has one evaluation left
        # At a solution y = prox_αf(y + α(Ay + b − y)): there u stays where it starts.
        u = torch.lerp(y, state.z, alpha) if state.u is None else state.u
        for _ in range(sweeps):
            reflected = 2 * y - u
            u = 2 * state.resolvent(reflected + alpha * f.b) - reflected
            x = f.prox(u, alpha)
            y = f.inner(x)
        state.u = u
        state.left -= sweeps + 1
        return x, state, sweeps
