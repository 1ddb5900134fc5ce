"""Every adjoint on two equilibria: its bias against the dense gradient, its time, and the memory it keeps.

The gradient is that of ⟨c, x*⟩ for a fixed c, with respect to the input and every weight, in float32.  The dense one
is in float64: v = (I − J)⁻ᵀ c sample by sample, at a solution to 1e-12.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import torch
from timing import alternate, header, machine
from torch import Tensor, nn

from implicitdl import SHINE, Anderson, Broyden, ImplicitAdjoint, PhantomGradient, Picard, Unrolled, fixed_point
from implicitdl.adjoints import Adjoint
from implicitdl.nn import ResidualBlock, TanhBlock
from implicitdl.solvers import Solver

RTOL, BATCH = 1e-5, 8
ROWS: list[tuple[str, Adjoint, Solver]] = [
    ("ImplicitAdjoint()", ImplicitAdjoint(), Broyden()),
    ("ImplicitAdjoint(order=2)", ImplicitAdjoint(order=2), Broyden()),
    ("PhantomGradient(): Jacobian-free", PhantomGradient(), Broyden()),
    ("PhantomGradient(steps=5)", PhantomGradient(steps=5), Broyden()),
    ("SHINE()", SHINE(), Broyden()),
    ("SHINE(refine=Anderson(max_steps=5))", SHINE(refine=Anderson(max_steps=5)), Broyden()),
    # Broyden's own steps are not to be differentiated.
    ("Unrolled()", Unrolled(), Picard()),
    ("Unrolled(checkpoint=True)", Unrolled(checkpoint=True), Picard()),
]


def problems(small: bool) -> list[tuple[str, nn.Module, Tensor]]:
    """Name, f(x, u) and u, float64."""
    torch.manual_seed(0)
    n, channels, side = (8, 2, 3) if small else (100, 16, 8)
    dense = TanhBlock(n)
    with torch.no_grad():
        # A random matrix has its eigenvalues in a disc; one beside it makes what the solvers have to learn.
        dense.linear.weight.normal_(0, 0.5 / n**0.5).add_(0.9 / n)
    conv = ResidualBlock(channels, channels + channels // 2, num_groups=channels // 2)
    return [
        (f"tanh(Wx + u), n = {n}", dense.double(), 0.3 * torch.randn(BATCH, n).double()),
        (
            f"the tutorial's block, {channels} channels of {side}×{side}", conv.double(),
            torch.randn(BATCH, channels, side, side).double(),
        ),
    ]  # fmt: skip


def dense_gradient(f: nn.Module, u: Tensor, c: Tensor) -> Tensor:
    u = u.clone().requires_grad_()
    with torch.no_grad():
        x = fixed_point(f, torch.zeros_like(u), u, solver=Anderson(rtol=1e-12, max_steps=2000)).value
    assert isinstance(x, Tensor)
    v = torch.empty_like(x)
    for i in range(len(x)):
        row = slice(i, i + 1)
        J = torch.autograd.functional.jacobian(lambda x, row=row: f(x, u[row]), x[row]).reshape(x[0].numel(), -1)
        v[i] = torch.linalg.solve((torch.eye(len(J)) - J).t(), c[i].flatten()).view_as(c[i])
    return _flat(torch.autograd.grad(f(x, u), (u, *f.parameters()), v))


def run(small: bool = False) -> None:
    before = torch.get_default_dtype()
    for name, f, u in problems(small):
        torch.set_default_dtype(torch.float64)
        c = torch.randn_like(u)
        exact = dense_gradient(f, u, c)
        torch.set_default_dtype(before)
        print(f"\nGradients of {name}, batch {BATCH}, float32, relative tolerance {RTOL:.0e} forward and backward")
        header(
            "adjoint", "solver", "cosine", "relative error", "forward ms", "backward ms", "kept MiB", "products with J"
        )
        rows = [_Row(adjoint, solver, f.float(), u.float(), c.float()) for _, adjoint, solver in ROWS]
        forward = alternate({name: row.forward for (name, *_), row in zip(ROWS, rows, strict=True)}, rounds=7)
        backward = alternate({name: row.backward for (name, *_), row in zip(ROWS, rows, strict=True)}, rounds=7)
        for (name, _, solver), row in zip(ROWS, rows, strict=True):
            gradient = row.backward().double()
            cosine = torch.nn.functional.cosine_similarity(gradient, exact, dim=0)
            error = (gradient - exact).norm() / exact.norm()
            print(
                f"| {name} | {type(solver).__name__} | {cosine:.6f} | {error:.1e} | {forward[name] * 1e3:.1f} "
                f"| {backward[name] * 1e3:.1f} | {row.kept() / 2**20:.2f} | {row.products()} |",
                flush=True,
            )


class _Row:
    def __init__(self, adjoint: Adjoint, solver: Solver, f: nn.Module, u: Tensor, c: Tensor) -> None:
        own = getattr(adjoint, "solver", None)
        if own is not None:
            adjoint = replace(adjoint, solver=replace(own, rtol=RTOL))  # type: ignore[type-var]
        self.adjoint, self.solver = adjoint, replace(solver, rtol=RTOL)
        self.f, self.u, self.c = f, u.requires_grad_(), c
        self.solution = self.forward()

    def forward(self):  # type: ignore[no-untyped-def]
        return fixed_point(self.f, torch.zeros_like(self.u), self.u, solver=self.solver, adjoint=self.adjoint)

    def backward(self) -> Tensor:
        inputs = (self.u, *self.f.parameters())
        return _flat(torch.autograd.grad(self.solution.value, inputs, self.c, retain_graph=True))

    def kept(self) -> int:
        """Bytes that a forward pass leaves behind: what autograd saves, and the tensors that Python holds."""
        held = _living()
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            saved.update(_storage(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            solution = self.forward()
        assert solution.converged.all()
        return sum(size for place, size in (saved | _living()).items() if place not in held)

    def products(self) -> str:
        steps = self.solution.backward.steps
        return "" if steps is None else f"{steps.double().mean():.1f}"


def _living() -> dict[int, int]:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return {place: size for tensor in tensors for place, size in _storage(tensor).items()}


def _storage(tensor: Tensor) -> dict[int, int]:
    storage = tensor.untyped_storage()
    return {storage.data_ptr(): storage.nbytes()}


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in gradients])


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(machine())
    run(small="--small" in sys.argv)
