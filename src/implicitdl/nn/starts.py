"""Where a solve starts: at zero, at a given state, at noise, or where the last one ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._internal.errors import non_negative, positive, wrong
from ..fixed_point import State
from ..solution import Solution

# Of one state without its batch, or of each of its tensors.
Shape: TypeAlias = tuple[int, ...] | tuple[tuple[int, ...], ...]


class Start(nn.Module, ABC):
    """Gives x0 for the inputs u; a Module, so that what it holds moves with the model.

    A new one is a subclass with `forward`.  The start decides how long a solve takes, and which solution is found
    where there are several; the gradient of the solution does not depend on it.
    """

    @abstractmethod
    def forward(self, *u: Tensor) -> State:
        """x0, (batch, \\*state), or a tuple of such."""

    def keep(self, solution: Solution) -> None:
        """What the solve from this start found."""
        return


class ZeroStart(Start):
    """x0 = 0, shaped like the first tensor of u, or as given.

    Arguments:
        shape: of one state without its batch, such as (64,), or a tuple of such for a state of several tensors; the
            dtype is that of u where it is floating point.

    Example:
        >>> import torch
        >>> from implicitdl.nn import ZeroStart
        >>> ZeroStart((5,))(torch.ones(2, 3)).shape
        torch.Size([2, 5])
    """

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, *u: Tensor) -> State:
        if not u:
            raise wrong(
                "DEQ", "x0 as a tensor or a function, for an f without u", "none",
                "Pass x0=torch.zeros(batch, *state).",
            )  # fmt: skip
        like = u[0]
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        shape = like.shape[1:] if self.shape is None else self.shape
        several = any(isinstance(part, tuple) for part in shape)
        parts = tuple(
            like.new_zeros((len(like), *part), dtype=dtype)  # type: ignore[misc]
            for part in (shape if several else (shape,))
        )
        return parts if several else parts[0]

    def extra_repr(self) -> str:
        return "" if self.shape is None else f"shape={self.shape}"


class RandomStart(ZeroStart):
    """x0 normal in training, 0 in evaluation: what is trained so learns to have one solution, wherever it is sought.

    Arguments:
        scale: standard deviation of x0.
        share: of the samples, those that start from noise; the others start from 0.
        shape: as for `ZeroStart`.

    Source: Anil et al., Path Independent Equilibrium Models Can Better Exploit Test-Time Computation (2022).

    Example:
        >>> import torch
        >>> from implicitdl import DEQ
        >>> from implicitdl.nn import RandomStart
        >>> deq = DEQ(lambda x, u: torch.tanh(0.5 * x + u), x0=RandomStart(share=0.5))
        >>> deq(torch.ones(4, 3)).shape
        torch.Size([4, 3])
    """

    def __init__(self, scale: float = 1.0, *, share: float = 1.0, shape: Shape | None = None) -> None:
        super().__init__(shape)
        self.scale = positive("RandomStart", "scale", scale)
        self.share = non_negative("RandomStart", "share", share)
        if self.share > 1:
            raise wrong("RandomStart", "0 ≤ share ≤ 1", share)

    def forward(self, *u: Tensor) -> State:
        x0 = super().forward(*u)
        if not self.training:
            return x0
        parts = x0 if isinstance(x0, tuple) else (x0,)
        noisy = torch.rand(len(parts[0]), dtype=torch.float32, device=parts[0].device) < self.share
        drawn = tuple(torch.where(_like_rows(noisy, part), self.scale * torch.randn_like(part), part) for part in parts)
        return drawn if isinstance(x0, tuple) else drawn[0]

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"scale={self.scale}", f"share={self.share}", super().extra_repr())))


class WarmStart(Start):
    """x0 = the last solution, for inputs that change little from call to call: frames of a video, a full batch.

    Row i starts from row i of the last call.  Where the shape has changed since, where there is no last call, and for
    samples that did not converge, the solve starts from ``first``.  The memory is not part of the state_dict, and
    a run that resumes starts without it; `forget` empties it.

    Arguments:
        first: where to start without a last solution; `ZeroStart()`.

    Example:
        >>> import torch
        >>> from implicitdl import DEQ
        >>> from implicitdl.nn import WarmStart
        >>> deq = DEQ(lambda x, u: torch.tanh(0.9 * x + u), x0=WarmStart())
        >>> u = torch.ones(1, 3)
        >>> [int(deq.solve(u).steps) > 1 for _ in range(2)]
        [True, False]
    """

    def __init__(self, first: Start | None = None) -> None:
        super().__init__()
        self.first = ZeroStart() if first is None else first
        if not isinstance(self.first, Start) or isinstance(self.first, WarmStart):
            raise wrong("WarmStart", "first to be a start of another kind, such as ZeroStart()", repr(first))
        self._last: tuple[Tensor, ...] = ()
        self._converged = torch.empty(0, dtype=torch.bool, device="cpu")

    def forward(self, *u: Tensor) -> State:
        x0: State = self.first(*u)
        first = x0 if isinstance(x0, tuple) else (x0,)
        if [(part.shape, part.device) for part in first] != [(part.shape, part.device) for part in self._last]:
            return x0
        parts = tuple(
            torch.where(_like_rows(self._converged, part), last.to(part.dtype), part)
            for part, last in zip(first, self._last, strict=True)
        )
        return parts if isinstance(x0, tuple) else parts[0]

    def keep(self, solution: Solution) -> None:
        parts = solution.value if isinstance(solution.value, tuple) else (solution.value,)
        # A copy: the value is the user's, who may change it in place.
        self._last = tuple(part.detach().clone() for part in parts)
        self._converged = solution.converged

    def forget(self) -> None:
        """Start the next solve from ``first``."""
        self._last = ()


class FixedStart(Start):
    """x0 = a given state.

    Arguments:
        parts: the tensors of the state, each (batch, \\*state), or (1, \\*state) for every sample.
    """

    def __init__(self, *parts: Tensor) -> None:
        super().__init__()
        self.count = len(parts)
        for i, part in enumerate(parts):
            # It moves with the model, and is given anew where the model is built anew.
            self.register_buffer(f"part{i}", part.detach(), persistent=False)

    def forward(self, *u: Tensor) -> State:
        parts = tuple(self.get_buffer(f"part{i}") for i in range(self.count))
        if u:
            parts = tuple(part.expand(len(u[0]), *part.shape[1:]) if len(part) == 1 else part for part in parts)
        return parts if self.count > 1 else parts[0]


class ComputedStart(Start):
    """x0 = a function of u; a Module is registered, so that what it learns by `Unrolled` is trained and saved.

    Arguments:
        function: ``function(*u)`` gives x0.
    """

    def __init__(self, function: Callable[..., State]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *u: Tensor) -> State:
        x0: State = self.function(*u)
        return x0


def start(x0: Any) -> Start:
    """What a user may give as x0, as a `Start`."""
    if x0 is None:
        return ZeroStart()
    if isinstance(x0, Start):
        return x0
    parts = x0 if isinstance(x0, tuple) else (x0,)
    if parts and all(isinstance(part, Tensor) and part.dim() > 0 for part in parts):
        return FixedStart(*parts)
    if callable(x0) and not isinstance(x0, type):
        return ComputedStart(x0)
    raise wrong(
        "DEQ", "x0 to be a tensor (batch, *state), a tuple of such, a function of u, or a Start", repr(x0),
        "Leave it out to start from zeros like u.",
    )  # fmt: skip


def _like_rows(which: Tensor, x: Tensor) -> Tensor:
    """(batch,) in the number of dimensions that x has."""
    return which.view(-1, *[1] * (x.dim() - 1))
