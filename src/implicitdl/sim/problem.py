"""The rows of state matching: what is minimised, and over which data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .._internal.errors import finite, non_negative, wrong
from .face import Faces

# Samples of the states that are in memory in float64 at a time: 160 MiB for 5,000 features.
_CHUNK = 4096
# Strips of rows in which the Gram matrix is made up to its diagonal: nearly half of the work is left out.
_STRIPS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class RowProblem:
    """One independent convex problem per row t of T.

    min ½‖t − Xᵀa − Uᵀb‖² + λ(‖a‖₁ + ‖b‖₁) + ½μ(‖a‖² + ‖b‖²)   subject to  ‖a‖₁ ≤ κ

    The rows (a, b) of A and B have T = Z and κ < 1; those of C and D have T = Y and κ = ∞.

    Arguments:
        X: states (n, samples).
        U: inputs (p, samples).
        T: targets (rows, samples).
        lam: λ ≥ 0.
        kappa: κ > 0, the radius of the ball that holds a; ∞ for none.
        ridge: μ ≥ 0, which makes the penalty an elastic net.

    The data stay in their own dtype; sums over samples are made in float64, a few thousand samples at a time.

    Raises:
        ArgumentError: shapes that do not fit, a NaN or infinite entry, λ, κ or μ out of range.

    Example:
        >>> import torch
        >>> from implicitdl.sim.problem import RowProblem
        >>> problem = RowProblem(X=torch.eye(2, 3), U=torch.ones(1, 3), T=torch.ones(4, 3), lam=0.1, kappa=0.9)
        >>> problem.shape
        (4, 3)
    """

    X: Tensor
    U: Tensor
    T: Tensor
    lam: float
    kappa: float = math.inf
    ridge: float = 0.0

    def __post_init__(self) -> None:
        who = "RowProblem"
        m = self.T.shape[-1]
        for name in ("X", "U", "T"):
            states = getattr(self, name)
            if states.dim() != 2 or states.shape[1] != m or not states.is_floating_point() or m == 0:
                got = f"{tuple(states.shape)} of {states.dtype}"
                raise wrong(who, f"floating {name} of shape (features, samples={m})", got, "Columns are samples here.")
            finite(who, name, states)
        non_negative(who, "lam", self.lam)
        non_negative(who, "ridge", self.ridge)
        if not self.kappa > 0:
            raise wrong(who, "kappa > 0", self.kappa)

    @property
    def n(self) -> int:
        return self.X.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, n + p): of the unknowns w = (a, b)."""
        return self.T.shape[0], self.X.shape[0] + self.U.shape[0]

    def take(self, rows: Tensor) -> RowProblem:
        """The same problem for some of the rows; what is known of the data is kept."""
        part = replace(self, T=self.T[rows])
        part.__dict__.update(self._of_data)
        for name in ("correlation", "target_square"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][rows]
        return part

    def other(
        self,
        T: Tensor | None = None,
        *,
        lam: float | None = None,
        kappa: float | None = None,
        ridge: float | None = None,
    ) -> RowProblem:
        """The problem of other targets or settings on the same data."""
        part = replace(
            self,
            T=self.T if T is None else T,
            lam=self.lam if lam is None else lam,
            kappa=self.kappa if kappa is None else kappa,
            ridge=self.ridge if ridge is None else ridge,
        )
        if part.ridge == self.ridge:
            part.__dict__.update(self._of_data)
        return part

    @property
    def _of_data(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in ("_phi", "gram", "faces") if name in self.__dict__}

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(Φ, T) = ([X; U], T) of some samples at a time, in float64."""
        if self.T.shape[1] <= _CHUNK:
            yield self._phi, self.T.double()
            return
        for X, U, T in zip(*(states.split(_CHUNK, dim=1) for states in (self.X, self.U, self.T)), strict=True):
            yield torch.cat([X, U]).double(), T.double()

    @cached_property
    def _phi(self) -> Tensor:
        """Φ where it is a single chunk, converted once."""
        return torch.cat([self.X, self.U]).double()

    @cached_property
    def gram(self) -> Tensor:
        """G = ΦΦᵀ + μI, (d, d)."""
        return self._mirrored(self._lower(0, 1))

    def gram_of_all(self, process: int, processes: int, add: Callable[[Tensor], object]) -> None:
        """`gram`, of which each process makes a share, the same digits whoever makes which.

        Arguments:
            process, processes: which of how many this is.
            add: adds up a tensor over all processes, in place.
        """
        if "gram" not in self.__dict__:
            add(lower := self._lower(process, processes))
            self.__dict__["gram"] = self._mirrored(lower)

    def _lower(self, process: int, processes: int) -> Tensor:
        """ΦΦᵀ up to the diagonal, in the strips of one process of so many, and 0 elsewhere."""
        d = self.shape[1]
        lower = torch.zeros(d, d, dtype=torch.float64, device=self.T.device)
        for phi, _ in self.chunks():
            for first, last in self._strips[process::processes]:
                lower[first:last, :last].addmm_(phi[first:last], phi[:last].t())
        return lower

    def _mirrored(self, gram: Tensor) -> Tensor:
        """G from `_lower`, in place."""
        for first, last in self._strips:
            gram[:first, first:last] = gram[first:last, :first].t()
        gram.diagonal().add_(self.ridge)
        return gram

    @property
    def _strips(self) -> list[tuple[int, int]]:
        """The first row and the one after the last."""
        d = self.shape[1]
        size = -(-d // _STRIPS)
        return [(first, min(first + size, d)) for first in range(0, d, size)]

    @cached_property
    def faces(self) -> Faces:
        """Linear systems with submatrices of G."""
        return Faces(self.gram)

    @cached_property
    def correlation(self) -> Tensor:
        """q = TΦᵀ, (rows, d): minus the gradient of the smooth part at w = 0."""
        return self.image(self.T)

    def image(self, theta: Tensor) -> Tensor:
        """Φθ, (rows, d), for θ (rows, samples)."""
        total = torch.zeros(len(theta), self.shape[1], dtype=torch.float64, device=theta.device)
        for (phi, _), part in zip(self.chunks(), theta.split(_CHUNK, dim=1), strict=True):
            total.addmm_(part.double(), phi.t())
        return total

    @cached_property
    def target_square(self) -> Tensor:
        """(rows,) ‖t‖²."""
        return self.T.double().square().sum(dim=1)

    def lambda_max(self) -> Tensor:
        """(rows,) the smallest λ for which w = 0 is optimal."""
        return self.correlation.abs().amax(dim=1)

    def look(self, w: Tensor, correction: Tensor | None = None) -> Look:
        """θ = t − Φᵀw − Φᵀc from the data themselves, and what the objective and the dual need of it.

        With a ridge, of Φ and t with √μ I and 0 appended.

        The correction c is subtracted from the residual, not added to w: where the residual is far smaller than t,
        the difference t − Φᵀ(w + c) would lose to rounding what c is there to bring.
        """
        gradient = torch.zeros(self.shape, dtype=torch.float64, device=self.T.device)
        square, product = gradient.new_zeros(len(w)), gradient.new_zeros(len(w))
        for phi, T in self.chunks():
            theta = torch.addmm(T, w, phi, alpha=-1)
            if correction is not None:
                theta.addmm_(correction, phi, alpha=-1)
            gradient.addmm_(theta, phi.t())
            square += (theta * theta).sum(dim=1)
            product += (theta * T).sum(dim=1)
        if self.ridge > 0:
            appended = w if correction is None else w + correction
            gradient -= self.ridge * appended
            square += self.ridge * (appended * appended).sum(dim=1)
        return Look(gradient, square, product)

    def predicted(self, w: Tensor) -> Tensor:
        """wΦ, (rows, samples), in float64."""
        return torch.cat([w @ phi for phi, _ in self.chunks()], dim=1)

    def objective(self, w: Tensor, square: Tensor) -> Tensor:
        """(rows,) the objective at w, whose look has this square."""
        return 0.5 * square + self.lam * w.abs().sum(dim=1)


@dataclass(frozen=True)
class Look:
    """What a pass over the data tells of θ: Φθ (rows, d), ‖θ‖² and tᵀθ (rows,)."""

    gradient: Tensor
    square: Tensor
    product: Tensor

    def take(self, rows: Tensor) -> Look:
        return Look(self.gradient[rows], self.square[rows], self.product[rows])
