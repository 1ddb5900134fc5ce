"""DEQ: the solution of x = f(x, u) as a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .._internal.context import transformed
from .._internal.errors import positive_int, wrong
from .._internal.habits import unknown_keywords
from ..adjoints import Adjoint, ImplicitAdjoint
from ..equations.equilibrium import Equilibrium
from ..equations.frozen import Frozen
from ..fixed_point import State, check_settings, fixed_point
from ..solution import OnFailure, Report, Solution
from ..solvers import Auto, Solver
from ..statespace import StateSpace
from .starts import Start, start


class DEQ(nn.Module):
    """A deep equilibrium layer: the solution of x = f(x, u), for any f.

    The state, often written z*, is x here.  Dropout in f draws one mask, and batch norm makes one update of its
    running statistics, per solve (`Frozen`).  Where f has a method ``equilibrium(*u)`` that gives
    the same map as an `Equilibrium`, that is solved, with its Jacobian in closed form; only then do torch.func's
    transforms go through the layer (`fixed_point` says why).

    Arguments:
        f: ``f(x, u)``, a Module or any function.  u may be several tensors, ``f(x, u, v)``, or none, ``f(x)``; x a
            tensor or a tuple of tensors.
        solver: how to solve; `Auto()`.
        adjoint: how to differentiate; exact, `ImplicitAdjoint()`.
        x0: where to start: a tensor (batch, \\*state) or (1, \\*state), a tuple of such, a function of u, or a
            `Start` such as `WarmStart()`; zeros like u when left out.
        on_failure: what an unconverged sample causes: "warn", "raise" or "ignore".
        coupled: whether samples influence one another through f; as for `fixed_point`, None looks.
        trace: keep the residual of every evaluation in `stats`; None where the loop looks at every evaluation anyway,
            which it does unless f has an ``equilibrium``.

    Attributes:
        stats: the `Report` of the last call: residual, steps, converged and trace per sample, and the same of its
            backward solve once that has run; None before the first call.

    Source: Bai, Kolter & Koltun, Deep Equilibrium Models (2019).

    Example:
        >>> import torch
        >>> from implicitdl import DEQ, Anderson
        >>> from implicitdl.nn import ResidualBlock
        >>> deq = DEQ(ResidualBlock(8, 16), solver=Anderson(rtol=1e-4))
        >>> deq(torch.randn(2, 8, 5, 5)).sum().backward()
        >>> bool(deq.stats.converged.all()), deq.stats.backward.steps.shape
        (True, torch.Size([2]))
    """

    def __init__(
        self,
        f: Callable[..., State],
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        x0: State | Callable[..., State] | Start | None = None,
        on_failure: OnFailure = "warn",
        trace: bool | None = None,
        coupled: bool | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise unknown_keywords("DEQ", unknown)
        if not callable(f) or isinstance(f, type):
            raise wrong("DEQ", "f to be a function or a Module", repr(f), "Pass an instance, f(x, u).")
        self.f = f
        self.solver = Auto() if solver is None else solver
        self.adjoint = ImplicitAdjoint() if adjoint is None else adjoint
        check_settings("DEQ", self.solver, self.adjoint, on_failure, coupled)
        self.start = start(x0)
        self.on_failure = on_failure
        self.trace = trace
        self.coupled = coupled
        self.stats: Report | None = None

    def forward(self, *u: Tensor | tuple[Tensor, ...]) -> State:
        """The solution x, with its gradient.

        Arguments:
            u: the inputs of f beside x, (batch, ...) each; one tuple of them is taken for its parts.

        Returns:
            (batch, \\*state), or a tuple of such.
        """
        return self.solve(*u).value

    def solve(self, *u: Tensor | tuple[Tensor, ...]) -> Solution:
        """The solution with residual, steps and convergence per sample."""
        inputs = _inputs(u)
        closed_form = getattr(self.f, "equilibrium", None)
        if closed_form is not None:
            return self._solve(closed_form(*inputs), inputs, ())
        return self._solve(self.f, inputs, inputs)

    def iterates(self, *u: Tensor | tuple[Tensor, ...], at: Iterable[int]) -> tuple[Solution, tuple[State, ...]]:
        """The solution, and the way to it: what a loss on intermediate states needs (fixed-point correction).

        x_k, where f is evaluated for the k-th time, is returned as f(x_k, u) with the gradient of that one
        evaluation; nothing of the iteration is kept.  Where a solve ends before, x_k is the solution.

        Arguments:
            u: as for `forward`.
            at: the numbers k, from 1.

        Returns:
            The solution, and a state for each k, in the order of ``at``.

        Raises:
            ArgumentError: ``at`` is no numbers, or one is below 1; and as `fixed_point`.

        Source: Bai et al., Deep Equilibrium Optical Flow Estimation (2022).

        Example:
            >>> import torch
            >>> from implicitdl import DEQ
            >>> deq = DEQ(lambda x, u: torch.tanh(0.5 * x + u))
            >>> u = torch.ones(2, 3, requires_grad=True)
            >>> solution, (early, late) = deq.iterates(u, at=(2, 5))
            >>> loss = solution.value.sum() + 0.5 * late.sum() + 0.25 * early.sum()
            >>> loss.backward()
        """
        if not isinstance(at, Iterable):
            raise wrong("DEQ", "at to be numbers, such as (2, 5)", repr(at), f"Pass at=({at},) for one.")
        numbers = [positive_int("DEQ", "the numbers in at", k) for k in at]
        inputs = _inputs(u)
        f = _Watched(self.f, numbers)
        solution = self._solve(f, inputs, inputs)
        end = _detached(solution.value)
        # The solve has settled f's running statistics; these evaluations repeat its noise and move nothing.
        return solution, tuple(f(f.seen.get(k, end), *inputs) for k in numbers)

    def statespace(self) -> StateSpace:
        """The layer as matrices, which only a block that knows them has, such as `TanhBlock`.

        Raises:
            ArgumentError: f has no ``equilibrium_statespace()``: an arbitrary map is no φ(Ax + Bu).
        """
        of: Callable[[], StateSpace] | None = getattr(self.f, "equilibrium_statespace", None)
        if of is None:
            raise wrong(
                "DEQ", "an f that is some φ(Ax + Bu) and gives it as equilibrium_statespace()",
                f"the arbitrary {getattr(self.f, '__name__', type(self.f).__name__)}",
                "Convert what comes before and after the layer.",
            )  # fmt: skip
        return of()

    def _solve(self, f: Callable[..., State], inputs: tuple[Tensor, ...], args: tuple[Tensor, ...]) -> Solution:
        trace = not isinstance(f, Equilibrium) if self.trace is None else self.trace
        solution = fixed_point(
            f, _fitting(self.start(*inputs), inputs, f), *args,
            solver=self.solver, adjoint=self.adjoint, on_failure=self.on_failure, trace=trace, coupled=self.coupled,
        )  # fmt: skip
        if not transformed():  # what torch.func wraps must not outlive its transform
            self.start.keep(solution)
            self.stats = solution.report()
        return solution

    def extra_repr(self) -> str:
        f = "" if isinstance(self.f, nn.Module) else f"f={getattr(self.f, '__name__', self.f)}, "
        return f"{f}solver={self.solver}, adjoint={self.adjoint}, on_failure={self.on_failure!r}"


class _Watched(Frozen):
    """f that remembers the states of some of its evaluations, each with all samples."""

    divisible = False

    def __init__(self, f: Callable[..., State], numbers: list[int]) -> None:
        super().__init__(f)
        self.seen: dict[int, State] = {}
        self._numbers, self._count = numbers, 0

    def look(self, evaluate: Callable[[], Any]) -> bool:
        coupled = super().look(evaluate)
        self._count = 0
        self.seen.clear()
        return coupled

    def __call__(self, x: State, *u: Tensor) -> State:
        self._count += 1
        if self._count in self._numbers:
            self.seen[self._count] = _detached(x)
        fx: State = super().__call__(x, *u)
        return fx


def _inputs(u: tuple[Any, ...]) -> tuple[Tensor, ...]:
    parts: tuple[Any, ...] = u[0] if len(u) == 1 and isinstance(u[0], tuple) else u
    for part in parts:
        if not isinstance(part, Tensor) or part.dim() == 0:
            got = "a tensor without dimensions" if isinstance(part, Tensor) else type(part).__name__
            do = "torchdeq's deq(f, z0) is DEQ(f)(u) here" if callable(part) else "Let f close over what is no data"
            raise wrong("DEQ", "u of tensors (batch, ...)", got, f"{do}.")
    return parts


def _fitting(x0: State, u: tuple[Tensor, ...], f: Callable[..., State]) -> State:
    """x0, where it fits u, and f as far as its form tells; what it is made of, `fixed_point` looks at."""
    for part in x0 if isinstance(x0, tuple) else (x0,):
        if not isinstance(part, Tensor) or part.dim() == 0:
            continue
        if u and len(part) != len(u[0]):
            raise wrong(
                "DEQ", f"x0 of shape (batch={len(u[0])}, *state), as u has it", tuple(part.shape),
                "Pass x0 of one row, for any batch, or a function of u.",
            )  # fmt: skip
        if isinstance(f, Equilibrium) and part.numel() != f.b.numel():
            raise wrong("DEQ", f"x0 of {f.b[0].numel()} entries a sample, as f's states have", tuple(part.shape))
    return x0


def _detached(x: State) -> State:
    return tuple(part.detach() for part in x) if isinstance(x, tuple) else x.detach()
