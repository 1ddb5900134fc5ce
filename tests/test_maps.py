"""Every member of every map, wrapped and not: what a map declares of itself is true of its values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from implicitdl import CircularConvolution, CircularEquilibrium, Equilibrium, LowRankEquilibrium
from implicitdl.activations import LEAKY_RELU, RELU, TANH
from implicitdl.adjoints.unrolled import _Recomputed
from implicitdl.equations.function import FunctionMap, OneRow
from implicitdl.equations.map import Linearization, LinearMap, Map, Splittable

BATCH, N = 4, 6
F64 = torch.float64


def matrix(scale: float = 0.7) -> Tensor:
    A = torch.randn(N, N, dtype=F64, generator=torch.Generator().manual_seed(1))
    return scale * A / A.abs().sum(dim=1, keepdim=True)


def rows(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(BATCH, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def weighted(A: Tensor) -> Tensor:
    return A.clone().requires_grad_()


def function(shape: tuple[int, ...] = (N,)) -> FunctionMap:
    W = weighted(matrix())
    return FunctionMap(
        "test", lambda x, u: torch.tanh(x.flatten(1) @ W.t() + u).view_as(x), rows(*shape), (rows(N, seed=3),)
    )


def of_parts() -> FunctionMap:
    W = weighted(matrix()[:4, :4])

    def f(s: tuple[Tensor, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
        x, y = s
        return torch.tanh(x @ W.t() + u[:, :4]), 0.5 * y + 0.1 * x[:, :2] + u[:, 4:]

    return FunctionMap("test", f, (rows(4), rows(2)), (rows(N, seed=3),))


def circular() -> CircularEquilibrium:
    kernel = weighted(0.1 * torch.randn(1, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(5)))
    return CircularEquilibrium(CircularConvolution.of(kernel, (2, 3)), rows(1, 2, 3), RELU)


def low_rank() -> Map:
    L, R = (weighted(0.4 * rows(N, seed=s).t()[:, :3].contiguous()) for s in (7, 8))
    return LowRankEquilibrium(L, R, rows(N), TANH).reduced()


MAPS = {
    "function": function,
    "function of images": lambda: function((2, 3)),
    "function of parts": of_parts,
    "dense": lambda: Equilibrium(weighted(matrix()), rows(N), LEAKY_RELU),
    "dense, tanh": lambda: Equilibrium(weighted(matrix()), rows(N), TANH),
    "rows to be scaled": lambda: Equilibrium(weighted(matrix(3.0)), rows(N), RELU, radius=0.8),
    "triangular": lambda: Equilibrium(weighted(matrix(3.0).triu(1)), rows(N), RELU, triangular=True),
    "circular": circular,
    "low rank": low_rank,
}
WRAPPED = MAPS | {f"{name}, recomputed": (lambda make=make: _Recomputed(make())) for name, make in MAPS.items()}
every_map = pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
every_own = pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)


def point(f: Map) -> Tensor:
    """Away from the kinks of this seed."""
    size = 3 if "Reduced" in type(getattr(f, "_f", f)).__name__ or "Reduced" in type(f).__name__ else N
    return rows(size, seed=11)


def dense(f: Map, x: Tensor) -> Tensor:
    """J of every sample by autograd, (batch, d, d)."""
    J = torch.autograd.functional.jacobian(f, x)
    assert isinstance(J, Tensor)
    return torch.stack([J[i, :, i] for i in range(len(x))])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-11)


@every_map
def test_some_of_the_samples(make):
    f = make()
    x, some = point(f), torch.tensor([3, 1])
    whole = f(x)
    part = f.take(some)
    assert part is not None
    close(part(x[some]), whole[some])
    assert (part.check_interval, part.precision, part.parts, part.root) == (
        f.check_interval, f.precision, f.parts, f.root,
    )  # fmt: skip


@every_map
def test_jacobians(make):
    f = make()
    x = point(f)
    J = dense(f, x)
    value, jacobian = f.jacobian(x)
    close(value, f(x))
    close(jacobian(torch.tensor([2, 0])), J[[2, 0]])


def linearized(f: Map, x: Tensor) -> Linearization:
    at = f.linearize(x)
    assert at is not None
    return at


@every_own
def test_a_linearisation(make):
    f = make()
    x = point(f)
    J, at = dense(f, x), linearized(f, x)
    v = rows(x.shape[1], seed=12)
    close(at.value, f(x))
    assert at.value.requires_grad
    assert at.root == f.root
    close(at.vjp(v), torch.einsum("bij,bi->bj", J, v))
    close(at.jvp(v), torch.einsum("bij,bj->bi", J, v))


def linear_maps(f: Map, x: Tensor) -> list[LinearMap]:
    at, g = linearized(f, x), rows(x.shape[1], seed=13)
    return [at.adjoint_map(g), at.tangent_map(g)]


@every_own
def test_linear_maps(make):
    f = make()
    x = point(f)
    J = dense(f, x)
    v, some = rows(x.shape[1], seed=14), torch.tensor([3, 1])
    unit = torch.tensor([[0.25], [1.0], [2.0], [8.0]], dtype=F64)
    for linear, M in zip(linear_maps(f, x), (J.transpose(1, 2), J), strict=True):
        product = torch.einsum("bij,bj->bi", M, v)
        close(linear.product(v), product)
        close(linear(v), linear.constant + product)
        close(linear.after_zero(), linear(torch.zeros_like(v)))
        assert torch.equal(linear.divided(unit).constant, linear.constant / unit)
        close(linear.divided(unit)(v / unit), linear(v) / unit)
        part = linear.take(some)
        assert part is not None
        close(part(v[some]), linear(v)[some])
        value, jacobian = linear.jacobian(v)
        close(value, linear(v))
        close(jacobian(torch.arange(BATCH)), M)
        one = OneRow.of(linear, BATCH)
        assert isinstance(one, LinearMap)
        close(one(one.together(v)), one.together(linear(v)))
        close(one.constant + one.product(one.together(v)), one(one.together(v)))


@every_own
def test_one_row_for_the_batch(make):
    f = make()
    x = point(f)
    one = OneRow.of(f, BATCH)
    close(one(one.together(x)), one.together(f(x)))
    assert one.take(torch.tensor([0])) is None
    assert (one.parts is None) == (f.parts is None)
    if f.parts is not None:
        for joint, part in zip(one.parts, f.parts, strict=True):
            close(one.together(x)[:, joint], x[:, part].reshape(1, -1))


@every_own
def test_what_splitting_needs(make):
    f = make()
    x = point(f)
    split = [m for m in (f, *linear_maps(f, x)) if isinstance(m, Splittable)]
    assert bool(split) == isinstance(f, Splittable)
    for g in split:
        close(g.prox(g.affine(g.inner(x)), 1.0), g(x))
        # (I + α(I − A)) R = I: the resolvent undoes an affine step, whose constant is Ay + b at 0.
        y, alpha = rows(x.shape[1], seed=15), 0.6
        Ay = (g.affine(y) - g.affine(torch.zeros_like(y))).detach()
        close(g.resolvent(alpha)((1 + alpha) * y - alpha * Ay), y)
        m, L = g.bounds()
        assert float(((y - Ay) * y).sum()) >= (m - 1e-9) * float(y.square().sum())
        assert float((y - Ay).norm()) <= (L + 1e-9) * float(y.norm())


@every_own
def test_a_triangular_map_is_solved_in_one_pass(make):
    f = make()
    for g in (f, *linear_maps(f, point(f))):
        if g.triangular:
            x = g.substitute()
            close(g(x), x)
        else:
            with pytest.raises(NotImplementedError, match="is not triangular"):
                Map.substitute(g)


@pytest.mark.parametrize("shape", [(N,), (2, 3)])
def test_states_and_rows(shape):
    f = function(shape)
    x = rows(*shape, seed=16)
    assert torch.equal(f.state(f.rows(x)), x)


def test_a_map_of_the_users_own():
    from implicitdl import Anderson, fixed_point

    class Halving(Map):
        def __call__(self, x: Tensor, /) -> Tensor:
            return 0.5 * x + 1

    for solver in (None, Anderson()):
        solution = fixed_point(Halving(), torch.zeros(3, 2, dtype=F64), solver=solver)
        assert solution.converged.all()
        close(solution.value, torch.full((3, 2), 2.0, dtype=F64))
