"""No bound of a random model on a random box is violated: not at corners, by attacks, or at random points.

Models have every activation, weights that cancel, states at their kinks and where they are flat, loops that hardly
contract, inputs and outputs from 1e-6 to 1e6, and large offsets; boxes may have no width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from exact_outputs import LONG, Exact, points
from implicitdl import Picard, StateSpace, certify
from implicitdl.activations import BUILTIN
from implicitdl.certify import Box, Crown, Interval, Sensitivity
from implicitdl.statespace import Block, perron_root
from implicitdl.statespace.perron import gains

EARLY = Picard(max_steps=3)
# Of every case, and one of the others beside them.
ALWAYS = [Sensitivity(), Interval(), Crown()]
OTHERS = [Crown(rounds=1), Crown(steps=2), Interval(solver=EARLY), Crown(solver=EARLY, rounds=1)]


def case(seed: int, dtype: torch.dtype) -> tuple[StateSpace, np.ndarray, np.ndarray]:
    """A model and the ends of a box."""
    g = np.random.default_rng(seed)
    n, p, q = g.integers(1, 7), g.integers(1, 5), g.integers(1, 4)
    first = g.integers(1, n + 1)
    kinds = [BUILTIN[name] for name in g.choice(list(BUILTIN), 2)]
    blocks = [Block(kind, int(size)) for kind, size in zip(kinds, (first, n - first), strict=True) if size]
    unit = 10.0 ** g.uniform(-6, 6)
    center = unit * g.choice([0.0, 1.0, 1e3]) * g.standard_normal(p)
    radius = unit * 10.0 ** g.uniform(-8, 1) * g.choice([0.0, 1.0], p, p=[0.2, 0.8])

    def scaled(*shape: int) -> np.ndarray:
        return g.standard_normal(shape) * (g.random(shape) < 0.8)

    scale = np.exp(g.standard_normal(n) * g.choice([0.0, 1.0]))
    A = scale[:, None] * scaled(n, n) / scale
    B = scaled(n, p) / unit * g.choice([1.0, 1e-2, 1e2])
    z0 = g.choice([0.0, 1.0, 20.0, 300.0]) * g.standard_normal(n)
    # Around z0, whatever the centre is; or around where the input takes it.
    b_x = z0 - (B @ center if g.random() < 0.5 else 0)
    C = scaled(q, n) * 10.0 ** g.uniform(-6, 6)
    D = scaled(q, p) / unit * g.choice([0.0, 1.0, 1e6])
    b_y = g.choice([0.0, 1.0, 3e4, 1e6]) * g.standard_normal(q) - (D @ center if g.random() < 0.5 else 0)
    parts = [torch.tensor(M, dtype=dtype) for M in (A, B, C, D, b_x, b_y)]
    space = StateSpace(*parts, blocks=blocks)
    kappa = g.choice([0.5, 0.9, 0.999, 1 - 1e-6])
    shrunk = space.A * min(1.0, kappa / max(perron_root(gains(space)), 1e-9))
    return space.replace(A=shrunk), center - radius, center + radius


def misses(seed: int, dtype: torch.dtype, count: int, steps: int) -> Iterator[tuple[str, float, float]]:
    """For every bound of a case: what it is, by how much it is passed, and the same relative to the largest output.

    Positive is a violation, after what the reference itself may be off.
    """
    space, low, high = case(seed, dtype)
    exact, proved = Exact(space), certify.contractive("fuzz", space)
    u = points(exact, low, high, count, steps, seed)
    y, off = exact(u)
    size = max(np.abs(y).max(), np.finfo(float).tiny)
    box = Box(torch.from_numpy(low).unsqueeze(0), torch.from_numpy(high).unsqueeze(0))
    falls = any(block.activation.slope[0] < 0 for block in space.blocks)
    classes = max(space.q, 2)
    label = seed % classes
    scores, scores_off = (np.pad(M, ((0, 0), (classes - space.q, 0))) for M in (y, off))
    lead, lead_off = scores[:, [label]] - scores, scores_off[:, [label]] + scores_off
    for method in [Sensitivity(), Sensitivity(solver=EARLY)] if falls else [*ALWAYS, OTHERS[seed // 2 % 4]]:
        found = certify.output_bounds(proved, box, method)
        margin = certify.margins(proved, box, torch.tensor([label]), method).lower
        for what, passed in (
            ("upper", y - off - found.upper.numpy()),
            ("lower", found.lower.numpy() - y - off),
            ("margin", np.delete(margin.numpy() - lead - lead_off, label, axis=1)),
        ):
            yield f"{seed} {dtype} {method} {what}", passed.max(), passed.max() / size
    du = np.roll(u, 1, 0) - u
    dy, dy_off = np.roll(y, 1, 0) - y, np.roll(off, 1, 0) + off
    for bound, order in ((certify.lipschitz_inf, np.inf), (certify.lipschitz_two, 2)):
        most = LONG(bound(space)) * np.linalg.norm(du, order, 1)
        passed = (np.linalg.norm(dy, order, 1) - np.linalg.norm(dy_off, order, 1) - most * (1 + 1e-17)).max()
        yield f"{seed} {dtype} {bound.__name__}", passed, passed / size


@pytest.fixture(params=[torch.float32, torch.float64], ids=["default float32", "default float64"])
def default(request) -> torch.dtype:
    torch.set_default_dtype(request.param)
    return request.param


def violations(seeds: range, count: int, steps: int) -> list[tuple[str, float, float]]:
    dtypes = (torch.float32, torch.float64)
    return [miss for seed in seeds for miss in misses(seed, dtypes[seed % 2], count, steps) if not miss[1] <= 0]


def test_no_bound_is_violated(default):
    assert violations(range(20), count=50, steps=5) == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_no_bound_of_2000_models_is_violated(default):
    first = {torch.float32: 10_000, torch.float64: 20_000}[default]
    assert violations(range(first, first + 1000), count=1000, steps=20) == []
