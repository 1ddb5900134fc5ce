"""Image classifiers around one equilibrium: a dense one, and a convolutional one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from .._internal.errors import non_negative_int, open_unit, positive_int, wrong
from ..adjoints import Adjoint, ImplicitAdjoint
from ..solution import OnFailure
from ..solvers import PeacemanRachford, Solver
from .blocks import ResidualBlock, TanhBlock
from .deq import DEQ
from .monotone import MonotoneConvBlock
from .pretrained import Pretrained, load

if TYPE_CHECKING:
    from typing_extensions import Self


class _Classifier(Pretrained):
    """stem → deq → head; the figures of every solve are in ``deq.stats``."""

    stem: nn.Module
    deq: DEQ
    head: nn.Module

    def forward(self, u: Tensor) -> Tensor:
        """Class scores, (batch, output_dim)."""
        y: Tensor = self.head(self.deq(self.stem(u)))
        return y

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, solver: Solver | None = None, adjoint: Adjoint | None = None
    ) -> Self:
        """Read a classifier that `save_pretrained` wrote.

        Arguments:
            folder: where it lies.
            solver, adjoint: instead of the saved ones; needed where those are of the user's own classes.

        Raises:
            CheckpointError: nothing there, truncated, of another kind, or a pickle.
            ArgumentError: the classifier was saved with a class of the user's that was not given.
        """
        return load(cls, folder, solver=solver, adjoint=adjoint)

    @property
    def solver(self) -> Solver:
        return self.deq.solver

    @property
    def adjoint(self) -> Adjoint:
        return self.deq.adjoint

    @property
    def on_failure(self) -> OnFailure:
        return self.deq.on_failure


class DenseEquilibriumClassifier(_Classifier):
    """y = C x + c, where x = tanh(Wx + Bu + b): one dense equilibrium between two linear layers.

    Arguments:
        input_dim: p, numbers in an input, of any shape (batch, ...).
        output_dim: q, classes.
        hidden_dim: n, size of the state.
        solver, adjoint, on_failure: as for `DEQ`.

    Source: Kolter, Duvenaud & Johnson, Deep Implicit Layers tutorial (NeurIPS 2020), chapter 1.

    Example:
        >>> import torch
        >>> from implicitdl.nn import DenseEquilibriumClassifier
        >>> model = DenseEquilibriumClassifier(input_dim=784, output_dim=10, hidden_dim=100)
        >>> model(torch.rand(5, 1, 28, 28)).shape, model.deq.stats.steps.shape
        (torch.Size([5, 10]), torch.Size([5]))
    """

    saved_arguments: ClassVar = ("input_dim", "output_dim", "hidden_dim", "on_failure")

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int,
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        who = "DenseEquilibriumClassifier"
        self.input_dim = positive_int(who, "input_dim", input_dim)
        self.output_dim = positive_int(who, "output_dim", output_dim)
        self.hidden_dim = positive_int(who, "hidden_dim", hidden_dim)
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(input_dim, hidden_dim))
        self.deq = DEQ(TanhBlock(hidden_dim), solver=solver, adjoint=adjoint, on_failure=on_failure)
        self.head = nn.Linear(hidden_dim, output_dim)

    def forward(self, u: Tensor) -> Tensor:
        if u.dim() < 2 or u[0].numel() != self.input_dim:
            raise wrong(
                "DenseEquilibriumClassifier", f"u of shape (batch, ...) with {self.input_dim} numbers a sample",
                tuple(u.shape),
            )  # fmt: skip
        return super().forward(u)


class _ConvClassifier(_Classifier):
    """A convolutional stem, an equilibrium on its image, and a linear layer on cells of that."""

    def _assemble(
        self, input_channels: int, output_dim: int, channels: int, halvings: int, cells: int, kernel_size: int
    ) -> None:
        """All but the equilibrium."""
        who = type(self).__name__
        self.input_channels = positive_int(who, "input_channels", input_channels)
        self.output_dim = positive_int(who, "output_dim", output_dim)
        self.cells = positive_int(who, "cells", cells)
        self.halvings = non_negative_int(who, "halvings", halvings)
        self.channels = positive_int(who, "channels", channels)
        self.kernel_size = positive_int(who, "kernel_size", kernel_size)
        self.stem = _stem(input_channels, channels, halvings)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.AdaptiveAvgPool2d(cells),
            nn.Flatten(),
            nn.Linear(channels * cells * cells, output_dim),
        )

    def forward(self, u: Tensor) -> Tensor:
        if u.dim() != 4 or u.shape[1] != self.input_channels:
            raise wrong(type(self).__name__, f"images (batch, {self.input_channels}, height, width)", tuple(u.shape))
        return super().forward(u)


class ConvEquilibriumClassifier(_ConvClassifier):
    """A convolutional stem, one equilibrium of a `ResidualBlock` on its image, and a linear layer on cells of that.

    With the default stem and ``cells=4`` on 32×32 images it is the tutorial's network: Conv2d, BatchNorm, the
    equilibrium, BatchNorm, means over 8×8 pixels, Linear.

    Arguments:
        input_channels: of the images, (batch, input_channels, height, width) of any height and width.
        output_dim: classes.
        channels: of the equilibrium.
        inner_channels: between its two convolutions.
        halvings: how often the stem halves height and width, by a convolution of stride 2 each (and batch norm and
            ReLU between them).  A solve costs a quarter with each.
        cells: the image is averaged to (cells, cells) before the linear layer.
        kernel_size, num_groups: of the block.
        solver, adjoint, on_failure: as for `DEQ`.

    Source: Kolter, Duvenaud & Johnson, Deep Implicit Layers tutorial (NeurIPS 2020), chapter 4.

    Example:
        >>> import torch
        >>> from implicitdl.nn import ConvEquilibriumClassifier
        >>> model = ConvEquilibriumClassifier(1, 10, channels=16, inner_channels=16, halvings=2)
        >>> model(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    saved_arguments: ClassVar = (
        "input_channels", "output_dim", "channels", "inner_channels", "halvings", "cells", "kernel_size", "num_groups",
        "on_failure",
    )  # fmt: skip

    def __init__(
        self,
        input_channels: int,
        output_dim: int,
        channels: int = 48,
        inner_channels: int = 64,
        *,
        halvings: int = 0,
        cells: int = 4,
        kernel_size: int = 3,
        num_groups: int = 8,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        self.inner_channels = positive_int("ConvEquilibriumClassifier", "inner_channels", inner_channels)
        self.num_groups = positive_int("ConvEquilibriumClassifier", "num_groups", num_groups)
        # The block before the stem, so that one seed gives the tutorial's weights.
        f = ResidualBlock(channels, inner_channels, kernel_size, num_groups)
        self._assemble(input_channels, output_dim, channels, halvings, cells, kernel_size)
        self.deq = DEQ(f, solver=solver, adjoint=adjoint, on_failure=on_failure)


class MonotoneConvClassifier(_ConvClassifier):
    """A convolutional stem, the equilibrium of a `MonotoneConvBlock` on its image, and a linear layer on cells of that.

    The equilibrium exists and is found for all weights, so training needs no care for it.

    Arguments:
        input_channels: of the images, (batch, input_channels, height, width) of any height and width.
        output_dim: classes.
        channels: of the equilibrium.
        m: the strong monotonicity of I − A, in (0, 1).
        halvings, cells: as for `ConvEquilibriumClassifier`.
        kernel_size: of the block.
        solver: `PeacemanRachford()` by default.
        adjoint: exact by default, and solved by `PeacemanRachford()` too.
        on_failure: as for `DEQ`.

    Source: Winston & Kolter, Monotone operator equilibrium networks (2020): their network of a single convolution.

    Example:
        >>> import torch
        >>> from implicitdl.nn import MonotoneConvClassifier
        >>> MonotoneConvClassifier(1, 10, channels=8, halvings=2)(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    saved_arguments: ClassVar = (
        "input_channels", "output_dim", "channels", "m", "halvings", "cells", "kernel_size", "on_failure",
    )  # fmt: skip

    def __init__(
        self,
        input_channels: int,
        output_dim: int,
        channels: int = 32,
        *,
        m: float = 0.1,
        halvings: int = 1,
        cells: int = 4,
        kernel_size: int = 3,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        self.m = open_unit("MonotoneConvClassifier", "m", m)
        f = MonotoneConvBlock(channels, kernel_size, m=m)
        self._assemble(input_channels, output_dim, channels, halvings, cells, kernel_size)
        splitting = PeacemanRachford()
        self.deq = DEQ(
            f,
            solver=splitting if solver is None else solver,
            adjoint=ImplicitAdjoint(solver=splitting) if adjoint is None else adjoint,
            on_failure=on_failure,
        )


def _stem(input_channels: int, channels: int, halvings: int) -> nn.Sequential:
    """Convolution and batch norm, once or once a halving; channels double from one to the next."""
    count = max(halvings, 1)
    widths = [input_channels, *(max(channels >> later, 1) for later in reversed(range(count)))]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        if layers:
            layers.append(nn.ReLU())
        stride = 2 if halvings else 1
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.BatchNorm2d(after)]
    return nn.Sequential(*layers)
