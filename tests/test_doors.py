"""What f returns and what is passed to a solve: dtypes, kinds of states, memory that is used again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from implicitdl import DEQ, Aitken, Anderson, ArgumentError, Auto, Broyden, Newton, Picard, fixed_point

SOLVERS = [Auto(), Picard(), Aitken(), Anderson(), Broyden(), Newton()]
by_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)


class TestDtypeOfF:
    @by_solver
    def test_another_than_that_of_the_state(self, solver):
        w = torch.rand(64, dtype=torch.float64)
        deq = DEQ(lambda x, u: torch.tanh(0.5 * x * w + u), solver=solver)
        with pytest.raises(
            ArgumentError, match=r"f to return torch.float32.*got torch.float64. Start from x0 of torch.f"
        ):
            deq(torch.randn(33, 64, dtype=torch.float32))
        deq(torch.randn(33, 64, dtype=torch.float64))

    @by_solver
    def test_none_that_a_state_may_have_or_fewer_digits(self, solver):
        x0 = torch.zeros(2, 3, dtype=torch.float64)
        for dtype in (torch.int64, torch.bool, torch.complex128, torch.float32, torch.float16):
            with pytest.raises(ArgumentError, match=f"f to return torch.float64, the dtype of x0, got {dtype}"):
                fixed_point(lambda x, to=dtype: (0.5 * x + 1).to(to), x0, solver=solver)

    @by_solver
    def test_of_one_part_of_a_tuple(self, solver):
        x0 = torch.ones(2, 2, 3, dtype=torch.float64).unbind()
        with pytest.raises(ArgumentError, match=r"got \[torch.float64, torch.float32\]"):
            fixed_point(lambda s: (0.5 * s[0], (0.5 * s[1]).float()), x0, solver=solver)

    @by_solver
    def test_that_changes_on_the_way(self, solver):
        seen = []

        def f(x):
            seen.append(x)
            return (0.5 * x + 1).to(torch.float64 if len(seen) < 2 else torch.float32)

        with pytest.raises(
            ArgumentError, match=r"f to return torch.float64, as in its first evaluation, got torch.float32"
        ):
            fixed_point(f, torch.zeros(2, 3, dtype=torch.float64), solver=solver)

    def test_autocast_decides_the_dtype_of_the_state(self):
        layer = nn.Linear(4, 4, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            x = fixed_point(lambda x: 0.3 * layer(x), torch.zeros(2, 4, dtype=torch.float32)).value
        assert x.dtype == torch.bfloat16

    def test_autocast_does_not_make_double_precision(self):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ArgumentError, match=r"got torch.float64"):
            fixed_point(lambda x: 0.3 * x.double(), torch.zeros(2, 4, dtype=torch.float32))


class TestMemoryThatFUsesAgain:
    @pytest.mark.parametrize("solver", [Auto(), Picard(), Aitken(), Anderson(), Broyden(), Newton(dense=False)])
    def test_one_array_refilled(self, solver):
        exact = fixed_point(lambda x: torch.cos(0.5 * x), torch.zeros(3, 4)).value
        for buffers in (1, 2):
            outs = itertools.cycle([torch.empty(3, 4).numpy() for _ in range(buffers)])

            def f(x, outs=outs):
                out = next(outs)
                np.cos(0.5 * x.numpy(), out=out)
                return torch.from_numpy(out)

            with torch.no_grad():
                solution = fixed_point(f, torch.zeros(3, 4), solver=solver)
            assert solution.converged.all()
            torch.testing.assert_close(solution.value, exact, rtol=20 * solver.tolerance(exact.dtype), atol=0)

    def test_the_value_is_not_that_of_the_user(self):
        held = torch.ones(2, 3)
        fixed_point(lambda x: held, torch.zeros(2, 3)).value.mul_(2)
        assert (held == 1).all()
