"""Activation: φ with all that the mathematics needs to know about it, in one record."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._internal.errors import wrong
from .solution import ImplicitFunctionWarning

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """An elementwise activation φ.

    Arguments:
        name: how it is called in a saved configuration.
        phi: z ↦ φ(z), elementwise.
        dphi: z ↦ φ'(z), elementwise.  At a kink, one of the one-sided slopes.
        slope: a lower and an upper bound of φ', (inf φ', sup φ') if they are known.
        homogeneous: whether φ(t z) = t φ(z) for t ≥ 0 (ReLU and its like).

    Attributes:
        compiled: the number of φ in the compiled loop, which knows some of the built-in ones; None of all others.

    Example:
        >>> import torch
        >>> from implicitdl.activations import RELU, SILU
        >>> RELU.phi(torch.tensor([-1.0, 2.0])), RELU.lipschitz
        (tensor([0., 2.]), 1.0)
        >>> round(SILU.lipschitz, 3)
        1.1
    """

    name: str
    phi: Elementwise
    dphi: Elementwise
    slope: tuple[float, float]
    homogeneous: bool = False
    compiled: int | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def lipschitz(self) -> float:
        """max |φ'|: ‖A‖∞ ≤ κ / lipschitz makes x ↦ φ(Ax + b) a contraction."""
        return max(abs(self.slope[0]), abs(self.slope[1]))

    def prox(self, u: Tensor, alpha: float) -> Tensor:
        """prox_αf(u) = (I + α∂f)⁻¹u of the convex f with φ = prox_f; f exists when the slopes of φ lie in [0, 1].

        A φ that is linear on either side of 0 is y = s u with the slope s of that side, so ∂f(y) = (1/s − 1)y there,
        and prox_αf(u) = s u / (s + α(1 − s)): φ itself for ReLU, another function for leaky ReLU.
        """
        if alpha == 1.0:
            return self.phi(u)
        if not self.homogeneous:
            raise wrong(
                "Activation.prox", "alpha=1 for an activation that is not positively homogeneous",
                f"alpha={alpha:.6g} for {self.name}", "Use alpha=1, or an activation such as RELU.",
            )  # fmt: skip
        s = self.dphi(u)
        return self.phi(u) / (s + alpha * (1 - s))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # phi and dphi may be lambdas, which pickle refuses; a built-in is found again by its name.
        if BUILTIN.get(self.name) is self:
            return _builtin, (self.name,)
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: object) -> Activation:
        return self


def derivative_of(phi: Elementwise) -> Elementwise:
    """φ' by autograd, for an elementwise φ that comes without one."""
    return _Derivative(phi)


@dataclass(frozen=True)
class _Derivative:  # a class, not a closure, so that a model which holds it can be pickled
    phi: Elementwise

    def __call__(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = self.phi(z)
        return torch.autograd.grad(y, z, torch.ones_like(y))[0]


def bounded_numerically(name: str, phi: Elementwise, dphi: Elementwise) -> Activation:
    """An Activation for a φ whose slope is not known: the slope is bounded on a grid, and that is said aloud."""
    # 2·10⁵ points on [−100, 100]: a slope that varies on the scale of 1 is met to 1e-6, and an unbounded one
    # shows as the largest value being taken at the end of the interval.
    z = torch.linspace(-100.0, 100.0, 200_001, dtype=torch.float64, device="cpu")
    slopes = dphi(z)
    low, high = float(slopes.min()), float(slopes.max())
    warnings.warn(
        f"{name}: the slope of φ is not known; on [-100, 100] it lies in [{low:.4g}, {high:.4g}], and ‖A‖∞ is kept "
        f"below κ divided by its largest absolute value. Pass an Activation with the exact slope to silence this.",
        ImplicitFunctionWarning,
        stacklevel=3,
    )
    return Activation(name, phi, dphi, (low, high))


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) * 0.3989422804014327  # 1/√(2π)
    return 0.5 * (1 + torch.erf(z * 0.7071067811865476)) + z * density  # 1/√2


# max of SiLU' and GELU', where the second derivative vanishes (the tests find them attained).
_SILU = 1.099839320128867
_GELU = 1.1289041451851547


@dataclass(frozen=True)
class LeakySlope:  # a class, not a closure, so that a model which holds it can be pickled
    """1 for z > 0, and the slope on the negative side elsewhere."""

    negative: float

    def __call__(self, z: Tensor) -> Tensor:
        # In z's dtype from the start: where() of two numbers is of torch's default dtype, and float32 has no 0.01.
        return torch.full_like(z, self.negative).masked_fill(z > 0, 1.0)


RELU = Activation("relu", torch.relu, lambda z: (z > 0).to(z.dtype), (0.0, 1.0), homogeneous=True)
LEAKY_RELU = Activation(
    "leaky_relu",
    lambda z: F.leaky_relu(z, 0.01),
    LeakySlope(0.01),
    (0.01, 1.0),
    homogeneous=True,
)
IDENTITY = Activation("identity", lambda z: z, torch.ones_like, (1.0, 1.0), homogeneous=True)
TANH = Activation("tanh", torch.tanh, lambda z: 1 - torch.tanh(z) ** 2, (0.0, 1.0))
SIGMOID = Activation("sigmoid", torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z), (0.0, 0.25))
HARDTANH = Activation("hardtanh", F.hardtanh, lambda z: (z.abs() < 1).to(z.dtype), (0.0, 1.0))
# Torch's own threshold, 20, leaves out e⁻²⁰ = 2e-9, which float64 can tell: the function would jump there, and bounds
# by its slopes would be false.  Beyond 40 it is less than the rounding of z.
SOFTPLUS = Activation("softplus", partial(F.softplus, threshold=40.0), torch.sigmoid, (0.0, 1.0))
ELU = Activation("elu", F.elu, lambda z: torch.exp(z.clamp(max=0)), (0.0, 1.0))
SILU = Activation("silu", F.silu, _silu_slope, (1 - _SILU, _SILU))
GELU = Activation("gelu", F.gelu, _gelu_slope, (1 - _GELU, _GELU))

# Those that the compiled loop knows, in the order of its numbers (`Phi` in phi.h).
COMPILED = (RELU, LEAKY_RELU, IDENTITY, HARDTANH, TANH, SIGMOID, SOFTPLUS, ELU, SILU, GELU)
for number, phi in enumerate(COMPILED):
    object.__setattr__(phi, "compiled", number)  # of these records alone: one made from them may have another φ
del number, phi

BUILTIN: dict[str, Activation] = {
    a.name: a for a in (RELU, LEAKY_RELU, IDENTITY, TANH, SIGMOID, HARDTANH, SOFTPLUS, ELU, SILU, GELU)
}


def _builtin(name: str) -> Activation:
    return BUILTIN[name]


_BY_FUNCTION: dict[object, Activation] = {
    torch.relu: RELU, F.relu: RELU, F.leaky_relu: LEAKY_RELU, torch.tanh: TANH, F.tanh: TANH,
    torch.sigmoid: SIGMOID, F.sigmoid: SIGMOID, F.hardtanh: HARDTANH, F.softplus: SOFTPLUS, F.elu: ELU,
    F.silu: SILU, F.gelu: GELU,
}  # fmt: skip


#: The modules of torch's that a built-in record is, with their default settings.
MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: RELU, nn.LeakyReLU: LEAKY_RELU, nn.Identity: IDENTITY, nn.Tanh: TANH, nn.Sigmoid: SIGMOID,
    nn.Hardtanh: HARDTANH, nn.Softplus: SOFTPLUS, nn.ELU: ELU, nn.SiLU: SILU, nn.GELU: GELU,
}  # fmt: skip


def _of_module(phi: nn.Module) -> Activation | None:
    kind = type(phi)
    return MODULES[kind] if kind in MODULES and _settings(phi) == _settings(kind()) else None


def _settings(phi: nn.Module) -> dict[str, Any]:
    """What decides its values."""
    return {name: value for name, value in vars(phi).items() if name[0] != "_" and name not in ("training", "inplace")}


def from_function(phi: Elementwise, dphi: Elementwise | None = None, *, name: str | None = None) -> Activation:
    """The Activation of a function: the built-in record for torch's own, otherwise with its slope bounded numerically.

    Arguments:
        phi: elementwise φ, a module such as ``torch.nn.Tanh()`` included.
        dphi: its derivative; by autograd when left out.
        name: how to call it; the function's own name when left out.

    Example:
        >>> import torch
        >>> from implicitdl.activations import TANH, from_function
        >>> from_function(torch.tanh) is TANH
        True
    """
    if dphi is None:
        known = _of_module(phi) if isinstance(phi, nn.Module) else _BY_FUNCTION.get(phi)
        if known is not None:
            return known
    own_name = getattr(phi, "__qualname__", type(phi).__name__)
    return bounded_numerically(str(name or own_name), phi, derivative_of(phi) if dphi is None else dphi)
