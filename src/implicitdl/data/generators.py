"""The generated data of the papers' experiments: spiky time series and arithmetic on slices of a vector."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .._internal.errors import choice, fraction, non_negative, non_negative_int, positive, positive_int, wrong

Slices = tuple[tuple[int, int], tuple[int, int]]


class Regression(NamedTuple):
    """A regression task as four tensors, rows as samples, in torch's default dtype.

    Attributes:
        u_train: (samples, …) inputs to train on.
        y_train: (samples, 1) their targets.
        u_test: (test samples, …) inputs to test on.
        y_test: (test samples, 1) their targets.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from implicitdl.data import arithmetic
        >>> task = arithmetic("add", samples=100)
        >>> train_dl = DataLoader(TensorDataset(task.u_train, task.y_train), batch_size=10, shuffle=True)
        >>> len(train_dl)
        10
    """

    u_train: Tensor
    y_train: Tensor
    u_test: Tensor
    y_test: Tensor


def spiky(
    *,
    level: int = 7,
    points: int = 10_000,
    span: float = 100.0,
    look_back: int = 60,
    test_fraction: float = 0.4,
    frequencies: Sequence[float] = (2, 23, 78, 100),
    amplitude: float | None = None,
    noise: float | None = None,
    spikes: int | None = None,
    spike_length: int | None = None,
    seed: int = 0,
) -> Regression:
    """The spiky series: a noisy sine with stretches of fast sines, whose next value is to be predicted.

    y(x) = sin x + N(0, noise²), and amplitude · Σ_f sin(f x) on the spiky stretches, which may overlap.

    Arguments:
        level: how spiky, ≥ 0; the defaults of the next four derive from it.
        points: length of the series, evenly spaced over x in [0, span].
        span: the right end of x, in radians.
        look_back: past values that predict the next one.
        test_fraction: the share of the windows, the last ones, that is the test set, in [0, 1).
        frequencies: f, the angular frequencies inside the spiky stretches.
        amplitude: of each fast sine; default level / 2.
        noise: standard deviation outside the stretches; default 0.05 · level.
        spikes: number of stretches, at uniformly random places; default 20 + level.
        spike_length: points in each stretch; default 100 + level.
        seed: of the noise and the places; the global random state is left alone.

    Returns:
        u: (windows, look_back, 1) and y: (windows, 1), points − look_back windows for training and testing
        together. The first test windows look back at training values, as a forecaster does; their targets
        are unseen.

    Raises:
        ArgumentError: an argument outside the ranges above, or a series shorter than a window or a stretch.

    Source: the ``spiky_data.py`` example of HoangP8/Implicit-Deep-Learning, whose look_back counts the
        target too.

    Example:
        >>> from implicitdl.data import spiky
        >>> task = spiky(seed=0)
        >>> task.u_train.shape, task.y_train.shape, task.u_test.shape
        (torch.Size([5964, 60, 1]), torch.Size([5964, 1]), torch.Size([3976, 60, 1]))
    """
    who = "spiky"
    level = non_negative_int(who, "level", level)
    points = positive_int(who, "points", points)
    look_back = positive_int(who, "look_back", look_back)
    test_fraction = fraction(who, "test_fraction", test_fraction)
    span = positive(who, "span", span)
    if not isinstance(frequencies, Iterable):
        raise wrong(who, "frequencies to be a sequence of numbers", repr(frequencies))
    tones = [non_negative(who, "frequencies", frequency) for frequency in frequencies]
    amplitude = non_negative(who, "amplitude", level / 2 if amplitude is None else amplitude)
    noise = non_negative(who, "noise", 0.05 * level if noise is None else noise)
    spikes = non_negative_int(who, "spikes", 20 + level if spikes is None else spikes)
    spike_length = positive_int(who, "spike_length", 100 + level if spike_length is None else spike_length)
    if points <= max(look_back, spike_length):
        longest = f"points > max(look_back={look_back}, spike_length={spike_length})"
        raise wrong(who, longest, points, "Ask for a longer series or shorter windows.")

    generator = _seeded(who, seed)
    x = torch.linspace(0, span, points, dtype=torch.float64, device="cpu")
    series = x.sin() + noise * torch.randn(points, generator=generator, dtype=torch.float64, device="cpu")
    fast = amplitude * (x[:, None] * torch.tensor(tones, dtype=torch.float64, device="cpu")).sin().sum(1)
    starts = torch.randint(points - spike_length + 1, (spikes, 1), generator=generator, device="cpu")
    inside = (starts + torch.arange(spike_length, device="cpu")).flatten()
    series[inside] = fast[inside]

    windows = series.to(torch.get_default_dtype()).unfold(0, look_back + 1, 1)
    u, y = windows[:, :-1, None].contiguous(), windows[:, -1:].contiguous()
    train = max(1, len(u) - round(test_fraction * len(u)))
    return Regression(u[:train], y[:train], u[train:], y[train:])


_TASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
}


def arithmetic(
    task: str = "add",
    *,
    inputs: int = 50,
    samples: int = 10_000,
    factor: float = 10.0,
    slices: Slices | None = None,
    seed: int = 0,
) -> Regression:
    """Arithmetic on the sums of two slices of a random vector, tested outside the training range.

    y = a ∘ b with a = Σ u[n:m], b = Σ u[p:q]; train on u ~ U(−1, 1), test on u ~ U(−factor/2, factor/2).

    The same seed gives the same slices and training data for every factor, so that one trained model can be
    tested along a range of factors; the paper's is ``torch.logspace(1, 5, 100)``. The targets of "div" have
    heavy tails, since b comes close to 0.

    Arguments:
        task: "add", "sub", "mul" or "div".
        inputs: entries of u, ≥ 1.
        samples: rows of the training set, and of the test set.
        factor: width of the test interval; the training interval's is 2.
        slices: ((n, m), (p, q)) with 0 ≤ n < m ≤ inputs; None draws both from the seed.
        seed: of the slices and the data; the global random state is left alone.

    Returns:
        u: (samples, inputs) and y: (samples, 1), for training and for testing.

    Raises:
        ArgumentError: an unknown task, a number outside its range, an empty slice or one outside u.

    Source: Decugis et al., arXiv:2407.14430, and the ``custom_nonlinearity`` notebook of
        alicia-tsai/implicit-deep-learning.

    Example:
        >>> import torch
        >>> from implicitdl.data import arithmetic
        >>> task = arithmetic("sub", slices=((0, 10), (40, 50)), factor=100.0)
        >>> u, y = task.u_test, task.y_test
        >>> torch.allclose(y[:, 0], u[:, :10].sum(1) - u[:, 40:].sum(1), atol=1e-3)
        True
    """
    who = "arithmetic"
    choice(who, "task", task, tuple(_TASKS))
    inputs = positive_int(who, "inputs", inputs)
    samples = positive_int(who, "samples", samples)
    factor = positive(who, "factor", factor)
    generator = _seeded(who, seed)
    # Drawn even when given, so that the data of a seed do not depend on who chose the slices.
    drawn = _random_slice(inputs, generator), _random_slice(inputs, generator)
    first, second = drawn if slices is None else _checked_slices(who, slices, inputs)

    def pairs(half_width: float) -> tuple[Tensor, Tensor]:
        unit = 2 * torch.rand(samples, inputs, generator=generator, dtype=torch.float64, device="cpu") - 1
        u = (half_width * unit).to(torch.get_default_dtype())
        # Targets from the rounded u, summed in float64: what a model is asked for is exact to rounding.
        a, b = (u[:, start:stop].double().sum(1, keepdim=True) for start, stop in (first, second))
        return u, _TASKS[task](a, b).to(u.dtype)

    return Regression(*pairs(1.0), *pairs(factor / 2))


def _random_slice(inputs: int, generator: Generator) -> tuple[int, int]:
    start, stop = torch.randperm(inputs + 1, generator=generator, device="cpu")[:2].sort().values.tolist()
    return start, stop


def _checked_slices(who: str, slices: Slices, inputs: int) -> Slices:
    try:
        (n, m), (p, q) = (map(operator.index, ends) for ends in slices)
    except (TypeError, ValueError):
        n = m = p = q = 0
    if not (0 <= n < m <= inputs and 0 <= p < q <= inputs):
        raise wrong(who, f"slices ((n, m), (p, q)) with 0 ≤ n < m ≤ inputs={inputs}, p and q alike", slices)
    return (n, m), (p, q)


def _seeded(who: str, seed: int) -> Generator:
    return Generator().manual_seed(non_negative_int(who, "seed", seed))
