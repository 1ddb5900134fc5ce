"""The compiled step of Anderson acceleration against torch's: the same iterates, for each sample whatever its batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from implicitdl import Anderson, Equilibrium, Unrolled, fixed_point
from implicitdl.activations import IDENTITY
from implicitdl.equations.map import Map
from implicitdl.kernels import build
from implicitdl.kernels.anderson import Memory
from implicitdl.loop.iterate import SolveResult, iterate
from kernel_paths import threads, torch_alone
from precision import digits

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(build.library(torch.float64) is None, reason="no C compiler"),
]

BLOCK = 256  # of anderson.c


class Elementwise(Map):
    """x ↦ tanh(a ∘ x + b) by rows, with factors from −0.9 to 0.9: a state of any length at no price."""

    def __init__(self, b: Tensor, slowest: float = 0.9) -> None:
        self.b, self.slowest = b, slowest
        self.a = torch.linspace(-slowest, slowest, b.shape[1], dtype=b.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a * x + self.b)

    def take(self, rows: Tensor) -> Elementwise:
        return Elementwise(self.b[rows], self.slowest)


def solve(f: Elementwise | Equilibrium, solver: Anderson) -> SolveResult:
    with torch.no_grad():
        return iterate(f, torch.zeros_like(f.b), solver)


# Every tail of a vector and of a block.
lengths = st.integers(12, 81) | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])


class TestIterates:
    @given(
        d=lengths,
        batch=st.integers(1, 5),
        memory=st.integers(1, 5),
        damping=st.sampled_from([0.6, 1.0, 1.4]),
        steps=st.integers(1, 6),
    )
    def test_are_those_of_torch(self, d, batch, memory, damping, steps):
        f = Elementwise(torch.linspace(-1, 2, batch * d).view(batch, d))
        solver = Anderson(memory=memory, damping=damping, max_steps=steps)
        compiled = solve(f, solver)
        with torch_alone():
            plain = solve(f, solver)
        # Both round, and the least squares multiplies that by the condition of a memory of nearly parallel vectors.
        assert torch.allclose(compiled.x, plain.x, rtol=digits(1e-6, 1e-4), atol=digits(1e-8, 1e-4))
        assert torch.equal(compiled.stats.steps, plain.stats.steps)

    @pytest.mark.float64
    @pytest.mark.parametrize("rate", [0.99, 0.9, -0.9])
    def test_of_a_jacobian_of_rank_one_end_as_soon(self, rate):
        # All differences are parallel, and a memory of two has a singular least-squares problem.
        for n in (12, 20, 100):
            u, v = torch.randn(2, n)
            f = Equilibrium(rate * torch.outer(u, v) / (u @ v), torch.randn(3, n), IDENTITY)
            compiled = solve(f, Anderson())
            with torch_alone():
                plain = solve(f, Anderson())
            assert compiled.all_converged
            assert plain.all_converged
            assert int((compiled.stats.steps - plain.stats.steps).abs().max()) <= 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("memory", [1, 5, 12])
    def test_take_as_long_to_the_solution(self, memory, dtype):
        f = Elementwise(torch.linspace(-2, 2, 6 * 300, dtype=dtype).view(6, 300), slowest=0.97)
        solver = Anderson(memory=memory, max_steps=3000)
        compiled = solve(f, solver)
        with torch_alone():
            plain = solve(f, solver)
        assert compiled.all_converged
        assert abs(compiled.stats.steps - plain.stats.steps).max() <= 2
        change = (f(compiled.x) - compiled.x).norm(dim=1) / f(compiled.x).norm(dim=1)
        assert torch.allclose(compiled.stats.residual, change, rtol=1e-3)

    def test_restart_where_the_residual_grows(self):
        # Expanding: the residual doubles until the memory holds what it takes.
        f = Equilibrium(torch.diag(torch.tensor([-3.0, 2.5, -1.5, 0.5])), torch.ones(2, 4), IDENTITY)
        solver = Anderson(growth=1.05, max_steps=40)
        compiled = solve(f, solver)
        with torch_alone():
            plain = solve(f, solver)
        assert torch.equal(compiled.stats.converged, plain.stats.converged)
        assert torch.equal(compiled.stats.steps, plain.stats.steps)

    def test_a_longer_memory_than_it_has_room_for_is_left_to_torch(self):
        x = torch.zeros(2, 3)
        with torch.no_grad():
            assert Memory.of(x, 33, 2.0, 1.0) is None
            assert Memory.of(x, 32, 2.0, 1.0) is not None
        assert solve(Elementwise(torch.ones(2, 60)), Anderson(memory=40)).all_converged

    @pytest.mark.float64
    def test_where_a_graph_is_built_it_is_left_to_torch(self):
        b = torch.full((2, 3), 0.3, requires_grad=True)
        x = fixed_point(
            lambda x, b: torch.tanh(0.5 * x + b), torch.zeros(2, 3), b, solver=Anderson(), adjoint=Unrolled()
        )
        (slope,) = torch.autograd.grad(x.value.sum(), b)
        s = 1 - x.value.detach() ** 2
        assert torch.allclose(slope, s / (1 - 0.5 * s), rtol=1e-6)


class TestSamplesAlone:
    @given(d=lengths, batch=st.integers(2, 6), slowest=st.floats(0.1, 0.98))
    def test_a_sample_does_not_know_its_batch_nor_the_threads(self, d, batch, slowest):
        # From easy to hard, so that samples leave one by one and the others go on in a smaller batch.
        b = torch.logspace(-3, 1, batch).unsqueeze(1) * torch.linspace(-1, 1.5, d)
        with threads(2):
            together = solve(Elementwise(b, slowest), Anderson())
        for i in range(batch):
            with threads(1):
                alone = solve(Elementwise(b[i : i + 1], slowest), Anderson())
            assert torch.equal(alone.x[0], together.x[i])
            assert int(alone.stats.steps) == int(together.stats.steps[i])
            assert float(alone.stats.residual) == float(together.stats.residual[i])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_lost_sample_disturbs_nobody(self, bad):
        A, b = torch.diag(torch.linspace(-0.9, 0.9, 5)), torch.randn(3, 5)
        expected = solve(Equilibrium(A, b, IDENTITY), Anderson())
        b[1, 2] = bad
        found = solve(Equilibrium(A, b, IDENTITY), Anderson())
        assert found.stats.converged.tolist() == [True, False, True]
        assert torch.equal(found.x[[0, 2]], expected.x[[0, 2]])
        assert torch.equal(found.stats.steps[[0, 2]], expected.stats.steps[[0, 2]])

    def test_values_that_are_not_contiguous(self):
        b = torch.linspace(-1, 1, 4 * 50).view(4, 50)
        straight = solve(Elementwise(b), Anderson())

        class Strided(Elementwise):
            def __call__(self, x):
                return torch.stack((super().__call__(x), torch.full_like(x, torch.nan)), dim=-1)[..., 0]

            def take(self, rows):
                return Strided(self.b[rows])

        assert torch.equal(solve(Strided(b), Anderson()).x, straight.x)

    @pytest.mark.float64
    def test_values_that_f_overwrites_cost_steps_and_no_digits(self):
        b = torch.linspace(-1, 1, 4 * 50).view(4, 50)
        room = torch.empty_like(b)

        class Reused(Elementwise):
            def __call__(self, x):
                return torch.tanh(self.a * x + self.b, out=room[: len(x)])

            def take(self, rows):
                return None

        found = solve(Reused(b), Anderson())
        fresh = Elementwise(b)(found.x)
        assert found.all_converged
        assert ((fresh - found.x).norm(dim=1) <= 1.001e-10 * fresh.norm(dim=1)).all()

    def test_another_default_device(self):
        f = Elementwise(torch.ones(2, 8))
        with torch.device("meta"):
            assert solve(f, Anderson()).x.device.type == "cpu"
