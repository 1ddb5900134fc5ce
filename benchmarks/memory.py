"""Memory of a training step against the number of solver steps: kept tensors, counted by autograd's own hooks."""

from __future__ import annotations

import torch
from timing import header

from implicitdl import Equilibrium, ImplicitAdjoint, Picard, Unrolled, fixed_point
from implicitdl.adjoints import Adjoint

N, BATCH = 300, 100


def saved_bytes(steps: int, adjoint: Adjoint) -> int:
    """Bytes that a forward pass of exactly ``steps`` sweeps keeps for its backward pass."""
    torch.manual_seed(0)
    # A cyclic shift hardly contracted: after a thousand sweeps the residual is still far from 0, so all are made.
    A = (0.9999 * torch.eye(N).roll(1, dims=0)).requires_grad_()
    b = torch.rand(BATCH, N, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    solver = Picard(rtol=1e-12, max_steps=steps)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        solution = fixed_point(
            Equilibrium(A, b), torch.zeros(BATCH, N), solver=solver, adjoint=adjoint, on_failure="ignore"
        )
    assert (solution.steps == steps).all()
    return sum(kept.values())


def run() -> None:
    print(f"\nKept for backward by one forward pass, n = {N}, batch {BATCH}")
    header("adjoint", "10 steps", "1000 steps", "ratio")
    for adjoint in (ImplicitAdjoint(), ImplicitAdjoint(order=2), Unrolled()):
        few, many = saved_bytes(10, adjoint), saved_bytes(1000, adjoint)
        name = type(adjoint).__name__ + (f"(order={adjoint.order})" if isinstance(adjoint, ImplicitAdjoint) else "()")
        print(f"| {name} | {few / 2**20:.2f} MiB | {many / 2**20:.2f} MiB | {many / few:.2f} |", flush=True)


if __name__ == "__main__":
    run()
