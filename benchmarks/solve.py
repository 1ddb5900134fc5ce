"""The solve alone on a nonnegative A of ‖A‖∞ = 0.99, n = 300, where plain iteration needs hundreds of steps.

With positive input terms every unit is active and the spectral radius is 0.99 itself; with terms of either sign some
units are off and it is less.
"""

from __future__ import annotations

import torch
from peer import TorchidlModel, torchidl_model
from timing import alternate, header

from implicitdl import Equilibrium, fixed_point
from implicitdl.solvers import Auto

RTOL, N, P, BATCH = 1e-5, 300, 8, 100


def run() -> None:
    print(f"\nSolve, nonnegative A with ‖A‖∞ = 0.99, n = {N}, batch {BATCH}, relative tolerance {RTOL:.0e}")
    header(
        "input terms", "ours ms", "torchidl ms", "torchidl ÷ ours", "wanted", "our steps", "residual ours", "torchidl"
    )
    torch.manual_seed(0)
    A = torch.rand(N, N)
    A = 0.99 * A / A.sum(dim=1, keepdim=True)
    u = torch.rand(BATCH, P)
    for name, B in (("positive", torch.rand(N, P)), ("of either sign", torch.randn(N, P))):
        weights = {"A": A, "B": B, "C": torch.randn(10, N) / N, "D": torch.zeros(10, P)}
        peer, theirs_reached, _ = torchidl_model(weights, u, torch.zeros(BATCH, 10), RTOL)
        _row(name, A, B @ u.t(), peer, theirs_reached)


def _row(name: str, A: torch.Tensor, Z: torch.Tensor, peer: TorchidlModel, theirs_reached: float) -> None:
    ours, x0, zero = Equilibrium(A, Z.t().contiguous()), torch.zeros(BATCH, N), torch.zeros(N, BATCH)
    solution = fixed_point(ours, x0, solver=Auto(rtol=RTOL))
    f = peer.f
    t = alternate(
        {
            "ours": lambda: fixed_point(ours, x0, solver=Auto(rtol=RTOL)),
            "theirs": lambda: f.inn_pred(A, Z, zero, f.mitr, f.tol),
        },
        rounds=11,
    )
    print(
        f"| {name} | {t['ours'] * 1e3:.1f} | {t['theirs'] * 1e3:.1f} | {t['theirs'] / t['ours']:.1f} "
        f"| {'≥ 15' if name == 'positive' else ''} | {solution.steps.double().mean():.1f} "
        f"| {solution.residual.max():.0e} | {theirs_reached:.0e} |",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    run()
