"""Solver: the settings of a method and its single step.  Stopping, freezing and counting belong to the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._internal.errors import non_negative, open_unit, positive_int, real, settle, wrong
from ..equations.map import Map
from .state import InverseEstimate, Rows, precise

# A relative residual that the dtype's rounding lets every well-conditioned map reach.
_DEFAULT_RTOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Base class of the solvers.

    Arguments:
        rtol: relative tolerance of ‖f(x) − x‖₂ ≤ atol + rtol ‖f(x)‖₂, tested per sample, in (0, 1); None means 1e-10
            in float64, 1e-5 in float32 and 1e-2 in bfloat16 and float16.
        atol: absolute tolerance of the same test.
        max_steps: the most evaluations of f spent on a sample.

    A new solver is a subclass with `step`, and `init` where it has a state: the loop evaluates f, stops each sample at
    its own tolerance and counts.  Here is one.

    Example:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> from implicitdl import Solver, fixed_point
        >>> @dataclass(frozen=True, kw_only=True)
        ... class HeavyBall(Solver):
        ...     momentum: float = 0.3
        ...     def init(self, f, x):
        ...         return torch.zeros_like(x)  # the last step of every sample, (batch, d)
        ...     def step(self, f, x, fx, state):
        ...         state = fx - x + self.momentum * state
        ...         return x + state, state, 0  # the next x, the state, and evaluations of f made in here
        ...     def take(self, state, rows):
        ...         return state.index_select(0, rows)  # of the samples that are not done
        >>> bool(fixed_point(torch.cos, torch.zeros(1, 1), solver=HeavyBall()).converged)
        True
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 300

    #: Whether its answer is exact, so that how it has grown shows nothing.
    exact: ClassVar[bool] = False
    #: Whether its steps are made of residuals, which a root problem gives in place of f(x).
    by_residual: ClassVar[bool] = False
    #: Whether a step may go many times as far as f does.
    leaps: ClassVar[bool] = True

    def serves(self, f: Map) -> bool:
        """Whether f declares the structure that this solver needs."""
        return True

    def needs(self, f: Map) -> tuple[str, str, str]:
        """What it needs, what f is, and what to do about it, for the error where it does not serve."""
        raise NotImplementedError(f"{type(self).__name__} serves every map")

    @property
    def recovers(self) -> bool:
        """Whether it goes on where f is not finite at a point that it has tried."""
        return False

    def __post_init__(self) -> None:
        settle(self, open_unit, "rtol")
        settle(self, non_negative, "atol")
        settle(self, positive_int, "max_steps")

    def tolerance(self, dtype: torch.dtype) -> float:
        return self.rtol if self.rtol is not None else _DEFAULT_RTOL[dtype]

    def methods(self, f: Map) -> Iterator[Any]:
        """The methods that a sample goes through; all but the last may hand it over to the next."""
        yield self

    def check_interval(self, f: Map) -> int:
        """Steps between two looks at the residual."""
        return 1

    def init(self, f: Map, x: Tensor) -> Any:
        """State of the method at x, (batch, d)."""
        return None

    @abstractmethod
    def step(self, f: Map, x: Tensor, fx: Tensor, state: Any) -> tuple[Tensor, Any, int]:
        """From x and f(x): the next x, the next state, and the evaluations of f made on the way."""

    def evaluate(self, f: Map, x: Tensor, state: Any) -> Tensor:
        """f(x); a method that needs more of f at x than its value keeps it in its state."""
        return f(x)

    def norms(self, x: Tensor, fx: Tensor, state: Any) -> tuple[Tensor, Tensor] | None:
        """‖f(x) − x‖ and ‖f(x)‖ of every sample, where the method makes them anyway; outside of autograd.

        A step from the same x and f(x) may come next, or none, where all samples are done.
        """
        return None

    def correction(self, f: Map, x: Tensor, fx: Tensor, state: Any) -> Tensor | None:
        """Of a root problem, the Newton correction at x, (batch, d); inf where it is not known.

        Of a linear one, the part of the residual that is rounding, (batch,).
        """
        return None

    def take(self, state: Any, rows: Tensor) -> Any:
        """The state of some of the samples, when the others have finished."""
        return state.take(rows) if isinstance(state, Rows) else None

    def inverse(self, state: Any) -> InverseEstimate | None:
        """An estimate of (I − J)⁻¹ for every sample, where the method has one."""
        return None

    def hand_over(self, residual: np.ndarray, previous: np.ndarray, steps: int, rtol: float) -> np.ndarray | None:
        """Which samples the next method should take, given two residuals ``steps`` evaluations apart."""
        return None


def residual(f: Map, x: Tensor, fx: Tensor) -> Tensor:
    """f(x) − x in the precision that methods work in; a root problem is evaluated to −g(x), which is that already."""
    fx = fx.to(precise(fx.dtype))
    return fx if f.root else fx - x


def smallest_part(f: Map, fx: Tensor) -> Tensor:
    """‖f(x)‖ of every row, or of its smallest part that is not zero: what the tolerance of the row is relative to."""
    whole = torch.linalg.vector_norm(fx, dim=1)
    for columns in f.parts or ():
        size = torch.linalg.vector_norm(fx[:, columns], dim=1)
        whole = torch.where(size > 0, torch.minimum(whole, size), whole)
    return whole


def damping(who: str, name: str, value: Any) -> float:
    """β: a step may go twice as far as f does, at most."""
    if not 0.0 < (number := real(value)) <= 2.0:
        raise wrong(who, f"{name} in (0, 2]", repr(value))
    return number
