"""Problems with known answers, each with the reason why it is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations import LEAKY_RELU, RELU, Activation
from ..equations.equilibrium import Equilibrium
from ..equations.resolvent import bounds
from ..fixed_point import fixed_point
from ..solution import Solution
from ..solvers import Solver

F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """x = f(x, *args) with its exact answer.

    Attributes:
        exact: (batch, *state) the solution; NaN for samples that have none.
        solvable: (batch,) which samples have one that every solver must find.
        conditioning: bound on the error of a sample, in units of its relative residual times ‖x*‖.
    """

    name: str
    f: Callable[..., Tensor]
    x0: Tensor
    args: tuple[Tensor, ...]
    exact: Tensor
    solvable: Tensor
    conditioning: float

    def solve(self, solver: Solver, **options: Any) -> Solution:
        return fixed_point(self.f, self.x0, *self.args, solver=solver, **options)

    def sample(self, i: int) -> Problem:
        """One of its samples, alone."""
        one = slice(i, i + 1)
        f = self.f.take(torch.tensor([i])) if isinstance(self.f, Equilibrium) else self.f
        args = tuple(arg[one] for arg in self.args)
        return Problem(self.name, f, self.x0[one], args, self.exact[one], self.solvable[one], self.conditioning)


def problems() -> list[Problem]:
    """For every solver: contractive, slow, non-normal, rotation, mixed difficulty, divergent, a NaN sample, zero."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    n = 12
    W = 0.4 * normal(n, n) / n**0.5
    inside = torch.tanh(normal(5, n))
    contractive = Problem(
        "contractive", lambda x, b: torch.tanh(x @ W.t() + b), torch.zeros(5, n, dtype=F64),
        (torch.atanh(inside) - inside @ W.t(),), inside, torch.ones(5, dtype=torch.bool), 20.0,
    )  # fmt: skip

    positive = torch.rand(n, n, generator=g, dtype=F64)
    slow = _affine("slow", 0.99 * positive / positive.sum(dim=1, keepdim=True), normal(4, n))
    stretched = 0.5 * torch.eye(6, dtype=F64) + torch.diag(torch.full((5,), 3.0, dtype=F64), 1)
    non_normal = _affine("non-normal", stretched, normal(4, 6))
    turn = 0.95 * _quarter_turn()
    rotation = _affine("rotation", torch.block_diag(turn, turn @ turn, 0.5 * turn), normal(4, 6))

    rates = torch.tensor([[0.0], [0.5], [0.9], [0.98]], dtype=F64)
    target = normal(4, 3)
    mixed = Problem(
        "mixed", lambda x, c, t: c * x + (1 - c) * t, torch.zeros(4, 3, dtype=F64), (rates.expand(4, 3), target),
        target, torch.ones(4, dtype=torch.bool), 100.0,
    )  # fmt: skip

    divergent = Problem(
        "divergent", lambda x: x * x + 1, torch.ones(3, 1, dtype=F64), (), torch.full((3, 1), torch.nan, dtype=F64),
        torch.zeros(3, dtype=torch.bool), torch.inf,
    )  # fmt: skip

    poisoned = normal(3, 2)
    poisoned[1] = torch.nan
    nan_sample = Problem(
        "nan-sample", lambda x, b: 0.5 * x + b, torch.zeros(3, 2, dtype=F64), (poisoned,), 2 * poisoned,
        torch.tensor([True, False, True]), 4.0,
    )  # fmt: skip

    zero = Problem(
        "zero", lambda x: 0 * x, torch.zeros(2, 4, dtype=F64), (), torch.zeros(2, 4, dtype=F64),
        torch.ones(2, dtype=torch.bool), 1.0,
    )  # fmt: skip
    return [contractive, slow, non_normal, rotation, mixed, divergent, nan_sample, zero]


def expanding_problems() -> list[Problem]:
    """For solvers that need no contraction: affine, eigenvalues far outside the unit disc or along its rim."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    basis = torch.linalg.qr(normal(10, 10)).Q
    repelling = basis @ torch.diag(torch.linspace(-4.0, 3.7, 10, dtype=F64)) @ basis.t()
    turn = _quarter_turn()
    cycle = torch.eye(12, dtype=F64).roll(1, 0)
    shift = torch.diag(torch.ones(7, dtype=F64), 1)
    return [
        _affine("repelling on both sides", repelling, normal(4, 10)),
        _affine("expanding rotation", torch.block_diag(3 * turn, 1.5 * turn, -2 * turn), normal(4, 6)),
        _affine("cycle", 0.99 * cycle, normal(4, 12)),
        _affine("Jordan block", 0.9 * torch.eye(8, dtype=F64) + 0.2 * shift, normal(4, 8)),
        _affine("circular law", 0.95 * normal(20, 20) / 20**0.5, normal(4, 20)),
    ]


def monotone_problems() -> list[Problem]:
    """For what serves φ(Ax + b) with I − A ⪰ mI: ‖A‖ of any size, and as many units off as on."""
    g = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    def manufactured(name: str, A: Tensor, activation: Activation, batch: int = 4) -> Problem:
        z = normal(batch, len(A))
        exact = activation.phi(z)
        m, L = bounds(A)
        # m‖x − x*‖ ≤ (1 + L)‖f(x) − x‖, since x − f(x) is an inexactness of x and of (I − A)x; twice for ‖f(x)‖.
        return Problem(
            name, Equilibrium(A, z - exact @ A.t(), activation), torch.zeros_like(exact), (), exact,
            torch.ones(batch, dtype=torch.bool), 2 * (1 + L) / m,
        )  # fmt: skip

    def monotone(n: int, m: float, symmetric: float, skew: float) -> Tensor:
        P, Q = symmetric * normal(n, n) / n**0.5, skew * normal(n, n) / n**0.5
        return (1 - m) * torch.eye(n, dtype=F64) - P.t() @ P + Q - Q.t()

    return [
        manufactured("monotone", monotone(12, 0.5, 0.5, 0.5), RELU),
        manufactured("monotone, large", monotone(12, 0.5, 1.0, 1.5), RELU),
        manufactured("monotone, leaky", monotone(12, 0.5, 0.5, 0.5), LEAKY_RELU),
        manufactured("monotone, rotating", torch.eye(2, dtype=F64) / 2 + 2 * _quarter_turn(), RELU),
    ]


def _affine(name: str, A: Tensor, exact: Tensor) -> Problem:
    # ‖x − x*‖ ≤ ‖(I − A)⁻¹‖ ‖f(x) − x‖, and twice that for ‖f(x)‖ in place of ‖x*‖.
    condition = 2 * float(torch.linalg.matrix_norm(torch.linalg.inv(torch.eye(len(A), dtype=F64) - A), 2))
    return Problem(
        name, lambda x, b: x @ A.t() + b, torch.zeros_like(exact), (exact - exact @ A.t(),), exact,
        torch.ones(len(exact), dtype=torch.bool), condition,
    )  # fmt: skip


def _quarter_turn() -> Tensor:
    return torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
