"""Outputs of a small model in long double, with a bound of how far they are off, and points that look for large ones.

What is checked against them is checked to far less than the rounding of float64, where long double has more digits.
"""

from __future__ import annotations

import numpy as np
import torch

from implicitdl import StateSpace
from implicitdl.statespace.perron import gains

LONG = np.longdouble
EPS = np.finfo(LONG).eps


def _sigmoid(z):
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, small) / (1 + small)


def _erf(z):
    """2/√π exp(−z²) Σ 2ᵏz²ᵏ⁺¹/(2k + 1)!!, a sum without cancellation; beyond 7 it is 1 to 22 digits."""
    a = np.minimum(np.abs(z), 7)
    total = term = a
    k = 0
    while (term > EPS * total).any():
        k += 1
        term = term * (2 * a * a / (2 * k + 1))
        total = total + term
    root_pi = np.sqrt(4 * np.arctan(LONG(1)))
    return np.sign(z) * np.where(a < 7, 2 / root_pi * np.exp(-a * a) * total, 1)


PHI = {
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z > 0, z, LONG(0.01) * z),
    "identity": lambda z: z,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "hardtanh": lambda z: np.clip(z, -1, 1),
    "softplus": lambda z: np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))),
    "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "silu": lambda z: z * _sigmoid(z),
    "gelu": lambda z: z * (1 + _erf(z / np.sqrt(LONG(2)))) / 2,
}


class Exact:
    """y(u) of a model in long double."""

    def __init__(self, space: StateSpace) -> None:
        space = space.to(torch.float64)
        self.space = space
        self.A, self.B, self.C, self.D, self.b_x, self.b_y = (
            M.numpy().astype(LONG) for M in (*space.matrices, space.b_x, space.b_y)
        )
        M = gains(space).numpy()
        # (I − M)⁻¹ ≥ 0, by which a residual moves the state at most; twice, for its own rounding.
        self.inverse = 2 * np.abs(np.linalg.inv(np.eye(space.n) - M)).astype(LONG)
        self.slopes = np.concatenate([[block.activation.lipschitz] * block.size for block in space.blocks])

    def phi(self, z: np.ndarray) -> np.ndarray:
        parts = np.split(z, np.cumsum(self.space.sizes)[:-1], axis=1)
        return np.concatenate(
            [PHI[block.activation.name](part) for block, part in zip(self.space.blocks, parts, strict=True)], 1
        )

    def dphi(self, z: np.ndarray) -> np.ndarray:
        return self.space.activation.dphi(torch.from_numpy(z.astype(np.float64))).numpy()

    def states(self, u: np.ndarray, newton: int = 12) -> tuple[np.ndarray, np.ndarray]:
        """x by Newton's method from a few sweeps, and by how much its equation is missed, rounding included."""
        n = self.space.n
        A, b = self.A.astype(np.float64), u @ self.B.T + self.b_x
        x = np.zeros((len(u), n), LONG)
        for _ in range(20):
            x = self.phi(x @ self.A.T + b)
        missed, best = np.full((len(u), 1), np.inf, LONG), x
        for _ in range(newton):
            z = x @ self.A.T + b
            r = self.phi(z) - x
            worst = np.abs(r).max(1, keepdims=True)
            if not (worst < missed).any():
                break
            best, missed = np.where(worst < missed, x, best), np.minimum(worst, missed)
            jacobian = np.eye(n) - self.dphi(z)[:, :, None] * A
            x = x + np.linalg.solve(jacobian, r.astype(np.float64)[:, :, None])[:, :, 0]
        z = best @ self.A.T + b
        size = np.abs(best) @ np.abs(self.A).T + np.abs(u) @ np.abs(self.B).T + np.abs(self.b_x)
        r = np.abs(self.phi(z) - best) + 40 * EPS * (self.slopes * size + np.abs(best))
        return best, r

    def __call__(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y, (count, q), and how far it may be off."""
        x, r = self.states(u)
        y = x @ self.C.T + u @ self.D.T + self.b_y
        size = np.abs(x) @ np.abs(self.C).T + np.abs(u) @ np.abs(self.D).T + np.abs(self.b_y)
        return y, r @ self.inverse.T @ np.abs(self.C).T + 40 * EPS * size

    def slope(self, u: np.ndarray) -> np.ndarray:
        """dy/du, (count, q, p)."""
        x, _ = self.states(u, newton=4)
        A, B, C, D = (M.astype(np.float64) for M in (self.A, self.B, self.C, self.D))
        d = self.dphi(x @ self.A.T + u @ self.B.T + self.b_x)[:, :, None]
        return C @ np.linalg.solve(np.eye(len(A)) - d * A, d * B) + D


def points(exact: Exact, lower: np.ndarray, upper: np.ndarray, count: int, steps: int, seed: int) -> np.ndarray:
    """All corners of a box, random points, and where signed gradient steps for every output and its negative end."""
    g, p = np.random.default_rng(seed), len(lower)
    corners = np.array(np.meshgrid(*[[0, 1]] * p)).reshape(p, -1).T
    at = np.concatenate([corners, g.random((count, p)), g.random((2 * exact.space.q, p))])
    low, high = lower.astype(LONG), upper.astype(LONG)
    found = np.clip(low + at * (high - low), low, high)
    chosen = np.arange(2 * exact.space.q)
    attack = found[-len(chosen) :]
    for _ in range(steps):
        slope = exact.slope(attack)[chosen, chosen // 2] * np.where(chosen % 2, -1, 1)[:, None]
        attack = np.clip(attack + 2.5 / steps * (high - low) / 2 * np.sign(slope), low, high)
    return np.concatenate([found, attack])
