"""Systems of nonlinear equations with their customary starts: Moré, Garbow & Hillstrom (1981), and others like them."""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor


def columns(*parts: Tensor) -> Tensor:
    return torch.stack(parts, dim=1)


def gradient(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient of a sum of squares, as a system of equations."""

    def g(x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(value(point).sum(), point, create_graph=True)
        return slope

    return g


def rosenbrock(x: Tensor) -> Tensor:
    return columns(1 - x[:, 0], 10 * (x[:, 1] - x[:, 0] ** 2))


def generalised_rosenbrock(x: Tensor) -> Tensor:
    inner = 200 * (x[:, 1:-1] - x[:, :-2] ** 2) - 400 * x[:, 1:-1] * (x[:, 2:] - x[:, 1:-1] ** 2)
    first = -400 * x[:, 0] * (x[:, 1] - x[:, 0] ** 2) - 2 * (1 - x[:, 0])
    return torch.cat([first[:, None], inner - 2 * (1 - x[:, 1:-1]), 200 * (x[:, -1] - x[:, -2] ** 2)[:, None]], dim=1)


def powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x.unbind(1)
    return columns(a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2)


def powell_badly_scaled(x: Tensor) -> Tensor:
    return columns(1e4 * x[:, 0] * x[:, 1] - 1, (-x[:, 0]).exp() + (-x[:, 1]).exp() - 1.0001)


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x.unbind(1)
    return (
        100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
        + 10 * (b + d - 2) ** 2 + (b - d) ** 2 / 10
    )  # fmt: skip


def helical_valley(x: Tensor) -> Tensor:
    a, b, c = x.unbind(1)
    turn = torch.atan2(b, a) / (2 * pi)
    return columns(10 * (c - 10 * turn), 10 * ((a**2 + b**2).sqrt() - 1), c)


def watson(x: Tensor) -> Tensor:
    n = x.shape[1]
    t = torch.arange(1, 30, dtype=x.dtype)[:, None] / 29
    j = torch.arange(n, dtype=x.dtype)
    slope = x[:, 1:] @ (j[1:] * t ** (j[1:] - 1)).t()
    value = x @ (t**j).t()
    return (slope - value**2 - 1).square().sum(1) + x[:, 0] ** 2 + (x[:, 1] - x[:, 0] ** 2 - 1) ** 2


def chebyquad(x: Tensor) -> Tensor:
    n = x.shape[1]
    y = 2 * x - 1
    before, now, rows = torch.ones_like(y), y, []
    for i in range(1, n + 1):
        rows.append(now.mean(1) + (1 / (i * i - 1) if i % 2 == 0 else 0.0))
        before, now = now, 2 * y * now - before
    return columns(*rows)


def brown_almost_linear(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.cat([x[:, :-1] + x.sum(1, keepdim=True) - (n + 1), x.prod(1, keepdim=True) - 1], dim=1)


def shifted(x: Tensor, by: int) -> Tensor:
    """x_{i+by}, and 0 beyond the ends."""
    pad = x.new_zeros(len(x), abs(by))
    return torch.cat([x[:, by:], pad], dim=1) if by > 0 else torch.cat([pad, x[:, :by]], dim=1)


def boundary_value(x: Tensor) -> Tensor:
    n = x.shape[1]
    t = torch.arange(1, n + 1, dtype=x.dtype) / (n + 1)
    return 2 * x - shifted(x, -1) - shifted(x, 1) + (x + t + 1) ** 3 / (2 * (n + 1) ** 2)


def integral_equation(x: Tensor) -> Tensor:
    n = x.shape[1]
    t = torch.arange(1, n + 1, dtype=x.dtype) / (n + 1)
    below = torch.where(t[:, None] >= t, (1 - t[:, None]) * t, t[:, None] * (1 - t))
    return x + (x + t + 1) ** 3 @ below.t() / (2 * (n + 1))


def trigonometric(x: Tensor) -> Tensor:
    n = x.shape[1]
    i = torch.arange(1, n + 1, dtype=x.dtype)
    return n - x.cos().sum(1, keepdim=True) + i * (1 - x.cos()) - x.sin()


def variably_dimensioned(x: Tensor) -> Tensor:
    j = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    total = ((x - 1) * j).sum(1, keepdim=True)
    return x - 1 + j * total * (1 + 2 * total**2)


def broyden_tridiagonal(x: Tensor) -> Tensor:
    return (3 - 2 * x) * x - shifted(x, -1) - 2 * shifted(x, 1) + 1


def broyden_banded(x: Tensor) -> Tensor:
    band = sum(shifted(x * (1 + x), -k) for k in range(1, 6)) + shifted(x * (1 + x), 1)
    return x * (2 + 5 * x**2) + 1 - band


def freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x.unbind(1)
    return columns(-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b)


def beale(x: Tensor) -> Tensor:
    a, b = x.unbind(1)
    return sum((y - a * (1 - b ** (i + 1))) ** 2 for i, y in enumerate((1.5, 2.25, 2.625)))  # type: ignore[return-value]


def jennrich_sampson(x: Tensor) -> Tensor:
    i = torch.arange(1, 11, dtype=x.dtype)
    return ((2 + 2 * i) - (i * x[:, :1]).exp() - (i * x[:, 1:]).exp()).square().sum(1)


def brown_badly_scaled(x: Tensor) -> Tensor:
    return columns(x[:, 0] - 1e6, x[:, 0] * x[:, 1] - 2)


def box(x: Tensor) -> Tensor:
    t = torch.arange(1, 4, dtype=x.dtype) / 10
    a, b, c = (part[:, None] for part in x.unbind(1))
    return (-t * a).exp() - (-t * b).exp() - c * ((-t).exp() - (-10 * t).exp())


def himmelblau(x: Tensor) -> Tensor:
    return columns(x[:, 0] ** 2 + x[:, 1] - 11, x[:, 0] + x[:, 1] ** 2 - 7)


def arctangent(x: Tensor) -> Tensor:
    return torch.atan(x - 0.5)


def extended_powell(x: Tensor) -> Tensor:
    return torch.cat([powell_singular(x[:, i : i + 4]) for i in range(0, x.shape[1], 4)], dim=1)


def exponential(x: Tensor) -> Tensor:
    return x.exp() - shifted(x, 1) - 2


def _start(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def _chain(n: int) -> Tensor:
    t = torch.arange(1, n + 1, dtype=torch.float64)[None] / (n + 1)
    return t * (t - 1)


#: name → (g, x0)
PROBLEMS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "Rosenbrock": (rosenbrock, _start(-1.2, 1.0)),
    "generalised Rosenbrock": (generalised_rosenbrock, _start(*[-1.2, 1.0] * 3)),
    "Powell singular": (powell_singular, _start(3.0, -1.0, 0.0, 1.0)),
    "Powell badly scaled": (powell_badly_scaled, _start(0.0, 1.0)),
    "Wood": (gradient(wood), _start(-3.0, -1.0, -3.0, -1.0)),
    "helical valley": (helical_valley, _start(-1.0, 0.0, 0.0)),
    "Watson": (gradient(watson), torch.zeros(1, 6, dtype=torch.float64)),
    "Chebyquad": (chebyquad, torch.arange(1, 8, dtype=torch.float64)[None] / 8),
    "Brown almost linear": (brown_almost_linear, torch.full((1, 10), 0.5, dtype=torch.float64)),
    "boundary value": (boundary_value, _chain(10)),
    "integral equation": (integral_equation, _chain(10)),
    "trigonometric": (trigonometric, torch.full((1, 10), 0.1, dtype=torch.float64)),
    "variably dimensioned": (variably_dimensioned, 1 - torch.arange(1, 11, dtype=torch.float64)[None] / 10),
    "Broyden tridiagonal": (broyden_tridiagonal, torch.full((1, 10), -1.0, dtype=torch.float64)),
    "Broyden banded": (broyden_banded, torch.full((1, 10), -1.0, dtype=torch.float64)),
    "Freudenstein and Roth": (freudenstein_roth, _start(6.0, 3.0)),
    "Beale": (gradient(beale), _start(1.0, 1.0)),
    "Jennrich and Sampson": (gradient(jennrich_sampson), _start(0.3, 0.4)),
    "Brown badly scaled": (brown_badly_scaled, _start(1.0, 1.0)),
    "Box": (box, _start(0.0, 10.0, 20.0)),
    "Himmelblau": (himmelblau, _start(1.0, 1.0)),
    "arctangent": (arctangent, _start(20.0, -3.0)),
    "extended Powell singular": (extended_powell, _start(*[3.0, -1.0, 0.0, 1.0] * 3)),
    "exponential chain": (exponential, torch.full((1, 8), 3.0, dtype=torch.float64)),
}
