"""Whatever a compiled loop is given, it reads and writes no memory but its own: in a process of its own, which may die."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import implicitdl
from implicitdl import DEQ, Anderson, fixed_point
from implicitdl.activations import HARDTANH, RELU
from implicitdl.equations.map import Map
from implicitdl.kernels import build, loops
from implicitdl.kernels.anderson import Memory
from implicitdl.loop.iterate import iterate
from precision import digits

pytestmark = pytest.mark.skipif(build.library(torch.float64) is None, reason="no C compiler")

BATCH, N = 7, 20


class Labelled(Tensor):
    """A subclass whose numbers may lie anywhere."""


def given_back(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


# What stands where a tensor (BATCH, N) is expected, and is no such thing or lies in memory in another way.
STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "the other precision": lambda x: x.to(torch.float32 if x.dtype == torch.float64 else torch.float64),
    "half precision": lambda x: x.bfloat16(),
    "integers": lambda x: x.long(),
    "truth values": lambda x: x > 0,
    "complex": lambda x: torch.complex(x, x),
    "a sign that is not in memory": lambda x: torch.complex(x, x).conj().imag,
    "an expanded row": lambda x: x[:1].expand_as(x),
    "an expanded number": lambda x: x[0, 0].expand_as(x),
    "windows that overlap": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
    "columns first": lambda x: x.t().contiguous().t(),
    "every other number": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "one row": lambda x: x[:1],
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[:, :0],
    "too many rows": lambda x: torch.cat((x, x)),
    "too many columns": lambda x: torch.cat((x, x), dim=1),
    "one dimension": lambda x: x.flatten(),
    "three dimensions": lambda x: x[None],
    "no dimension": lambda x: x[0, 0],
    "one that requires grad": lambda x: x.clone().requires_grad_(),
    "a subclass": lambda x: x.as_subclass(Labelled),
    "on no device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :3]]),
    "torch's own zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "storage that was given back": given_back,
    "not finite": lambda x: torch.full_like(x, torch.nan),
}
DTYPES = (torch.float32, torch.float64)


def replaced(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The tensors with one of them, or two, made strange."""
    for count, change in itertools.product((1, 2), STRANGE.values()):
        for places in itertools.combinations(range(len(tensors)), count):
            changed = [change(t) if i in places and t.dim() == 2 else t for i, t in enumerate(tensors)]
            yield tuple(changed)


def every_door() -> None:
    for dtype in DTYPES:
        A, source = 0.04 * torch.randn(N, N, dtype=dtype), torch.randn(N, N, dtype=dtype)
        x, y, slope = torch.randn(3, BATCH, N, dtype=dtype)
        scale = torch.rand(N, 1, dtype=dtype)
        with torch.no_grad():
            for _ in range(2):
                for weights, b, x0, factors in replaced((A, x, y, slope)):
                    loops.sweeps(weights, None, b, x0, RELU.compiled, None, 1e-5, 0.0, 50, 2, 0.7, 40)
                    loops.sweeps(weights, 0.9, b, None, HARDTANH.compiled, None, 1e-5, 0.0, 1 << 40, 2, 0.7, 40)
                    loops.sweeps(weights, None, b, x0, loops.SLOPE, factors, 1e-5, 0.0, 50, 2, 0.7, 40)
                for v, factors, at, rows_of, s in replaced((x, slope, y, source, scale)):
                    loops.pull(v, factors, at, rows_of, s, 0.9)
                    loops.pull(v, factors, at, None, None, 0.9)
                for v, s, g in replaced((source, scale, A)):
                    loops.scale_rows(v, 0.9)
                    loops.scale_rows_vjp(v, s, g, 0.9)
                for a, b, c in replaced((x, y, slope)):
                    if loops.reachable(a):  # torch looks at what is not
                        loops.all_finite(a)
                    loops.norms(a, b)
                    loops.aitken(a, b, c, 1e-30, 1e3)


def every_value_of_anderson() -> None:
    for dtype, change in itertools.product(DTYPES, STRANGE.values()):
        for when in range(4):
            with torch.no_grad():
                memory = Memory.of(torch.zeros(BATCH, N, dtype=dtype), 2, 2.0, 1.0)
                assert memory is not None
                for k in range(6):
                    x, fx = torch.randn(2, BATCH, N, dtype=dtype)
                    x, fx = (change(x) if k == when else x), (change(fx) if k >= when else fx)
                    if memory.serves(x, fx):
                        memory.look(x, fx)
                        memory.look(x, fx)
                        memory.step(x, fx)
                    Memory.of(x, 2, 2.0, 1.0)


def another_precision() -> None:
    w = torch.rand(64, dtype=torch.float64)
    for a, b in [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]:
        for _ in range(50):
            with contextlib.suppress(ValueError):  # in words, where it is refused
                layer = DEQ(lambda x, u, b=b: torch.tanh(0.5 * x * w + u).to(b), solver=Anderson(max_steps=40))
                layer(torch.randn(33, 64, dtype=a))


class Changing(Map):
    """A user's own map of rows, whose values are not what they should be."""

    def __init__(self, b: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        self.b, self.change, self.calls = b, change, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        fx = torch.tanh(0.9 * x + self.b)
        return self.change(fx) if self.calls > 3 else fx

    def take(self, rows: Tensor) -> Changing:
        # One row too many.
        return Changing(torch.cat((self.b[rows], self.b[:1])), self.change)


def a_map_that_changes_its_mind() -> None:
    b = torch.logspace(-6, 2, 9, dtype=torch.float64)[:, None] * torch.randn(9, N, dtype=torch.float64)
    for change in STRANGE.values():
        if change is given_back:  # torch's own operations read there
            continue
        for _ in range(2):
            try:
                with torch.no_grad():
                    iterate(Changing(b, change), torch.zeros_like(b), Anderson(max_steps=60))
            # What torch says of such values.
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError, AttributeError):
                pass


def values_whose_storage_goes() -> None:
    tricks: list[Callable[[Tensor], object]] = [
        lambda old: old.untyped_storage().resize_(0),
        lambda old: old.untyped_storage().resize_(8),
        lambda old: old.untyped_storage().resize_(1 << 24),
        lambda old: old.set_(),
    ]
    for trick in tricks:
        held: list[Tensor] = []

        def f(x: Tensor, b: Tensor, trick: Callable[[Tensor], object] = trick, held: list[Tensor] = held) -> Tensor:
            held.append(torch.tanh(0.95 * x + b))
            if len(held) > 3:  # nobody but a memory needs so old a one
                trick(held.pop(0))
            return held[-1]

        for _ in range(10):
            u = torch.randn(3, 3000)
            found = fixed_point(f, torch.zeros_like(u), u, solver=Anderson(max_steps=60), on_failure="ignore")
            assert torch.isfinite(found.value).all()
            held.clear()


CASES = [every_door, every_value_of_anderson, another_precision, a_map_that_changes_its_mind, values_whose_storage_goes]


def test_the_process_lives():
    run = f"import {__name__} as tests\nfor case in tests.CASES: print(case.__name__, file=sys.stderr); case()"
    folders = Path(implicitdl.__file__).parents[1], Path(__file__).parent
    # Freed memory is overwritten, so that nobody reads old numbers there by luck.
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", f"import sys\n{run}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_strange_values_are_solved_by_torch():
    w = torch.linspace(-1, 1, 40)

    def f(x: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.9 * x * w + u).as_subclass(Labelled)

    u = torch.randn(5, 40)
    found = fixed_point(f, torch.zeros(5, 40), u, solver=Anderson())
    assert found.converged.all()
    assert torch.allclose(f(found.value, u), found.value, atol=digits(1e-8, 1e-4))


class TestWhatDoesNotFitIsLeftToTorch:
    def test_the_factors_of_scaled_rows(self):
        v, g = torch.randn(2, 6, 4, dtype=torch.float64)
        _, scale = loops.scale_rows(v, 0.9)
        expected = loops.scale_rows_vjp(v, scale, g, 0.9)
        assert torch.equal(loops.scale_rows_vjp(v, torch.stack((scale, scale), -1)[..., 0], g, 0.9), expected)
        assert loops.scale_rows_vjp(v, scale.float(), g, 0.9) is None
        assert loops.scale_rows_vjp(v, scale[:3], g, 0.9) is None
        assert loops.scale_rows_vjp(v, scale, g[:, :3], 0.9) is None

    def test_the_source_of_a_cotangent(self):
        v, slope, x = torch.randn(3, 5, 8, dtype=torch.float64)
        source, scale = torch.randn(8, 8, dtype=v.dtype), torch.rand(8, 1, dtype=v.dtype)
        expected = loops.pull(v, slope, x, source, scale, 0.9)[0]
        apart = torch.stack((scale, scale), -1)[..., 0]
        assert torch.equal(loops.pull(v, slope, x, source, apart, 0.9)[0], expected)
        assert loops.pull(v, slope, x, source.float(), scale, 0.9) is None
        assert loops.pull(v, slope, x, source, scale.float(), 0.9) is None
        assert loops.pull(v, slope, x, source[:7], scale, 0.9) is None
        assert loops.pull(v, slope, x, source, scale[:7], 0.9) is None

    def test_more_steps_than_the_loop_counts(self):
        A, b = torch.zeros(3, 3), torch.ones(2, 3)
        swept = loops.sweeps(A, None, b, None, RELU.compiled, None, 1e-10, 0.0, 1 << 40, 2, 0.7, 40)
        assert swept.unsolved == 0

    def test_what_torch_func_wraps(self):
        x = torch.randn(4, 3, 5)
        assert torch.func.vmap(lambda x: x * (loops.norms(x, x) is None))(x).equal(x)
        assert torch.func.functionalize(lambda x: x * (loops.norms(x, x) is None))(x[0]).equal(x[0])
