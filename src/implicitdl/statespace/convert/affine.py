"""A tensor inside a network, written as an affine function of the network's input and states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...activations import Activation
from ..block_solve import Block, joined
from ..matrices import assemble, coo, entries, linear, product, with_values
from ..space import StateSpace

# Of eps: a ResNet-18 is off by 10, and the rest is room for values that cancel.
ROUNDING = 4096


class NoFormError(Exception):
    """Why an operation has no implicit form, as "<reason>. <advice>."; its place in the module is added above."""


class Network:
    """The states that were found so far, in the order in which the network computes them.

    Arguments:
        inputs: (batch, \\*features) that the network is run on beside: what its operations make of them says where they
            write, what they share, and whether the rules are right.

    Attributes:
        p: features of the input.
        like: an empty tensor of the network's dtype and device.
        batch: how many samples the network sees; its value must not matter.
        layers: blocks, the rows of [B, A] and the bias of each group of states; columns are the input's features and
            then the states in their order, so that later ones need not be known.
        values: (batch, p + states) of the input and the states.
        largest: the largest entry that the network has met, which rounding is relative to.
    """

    def __init__(self, inputs: Tensor) -> None:
        self.values = inputs.flatten(1)
        self.p, self.batch = self.values.shape[1], len(inputs)
        self.like = inputs.new_empty(0)
        self.layers: list[tuple[tuple[Block, ...], Tensor, Tensor]] = []
        self.largest = max(1.0, float(inputs.abs().max()))

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def input(self, features: Sequence[int]) -> Affine:
        places = torch.arange(self.p, device=self.like.device)
        identity = coo(places, places, self.like.new_ones(self.p), (self.p, self.p))
        return Affine(self, identity, self.like.new_zeros(self.p), tuple(features))

    def append(self, blocks: tuple[Block, ...], M: Tensor, b: Tensor, values: Tensor | None = None) -> Affine:
        """The states φ(M[u; x] + b), as a new value; their values are given where they depend on each other."""
        start, size = self.width, len(b)
        if values is None:
            with torch.no_grad():
                values = joined(blocks).phi(self._product(M, b))
        self.layers.append((blocks, M, b))
        self.values = torch.cat((self.values, values), 1)
        rows = torch.arange(size, device=self.like.device)
        ones = torch.ones(size, dtype=self.like.dtype, device=self.like.device)
        return Affine(self, coo(rows, rows + start, ones, (size, start + size)), torch.zeros_like(ones), (size,))

    def evaluated(self, value: Affine) -> Tensor:
        """(batch, \\*features) the value for the inputs that the network is run on."""
        with torch.no_grad():
            return self._product(value.M, value.c).reshape(value.shape)

    def _product(self, M: Tensor, b: Tensor) -> Tensor:
        return linear(self.values[:, : M.shape[1]], M, b)

    def far(self, found: Tensor, expected: Tensor) -> float | None:
        """The largest difference where it is more than rounding, else None."""
        self.largest = max(self.largest, float(expected.abs().max()) if expected.numel() else 0.0)
        gap = float((found - expected).abs().max()) if expected.numel() else 0.0
        return None if gap <= ROUNDING * torch.finfo(self.like.dtype).eps * self.largest else gap

    def sample(self, constant: Tensor) -> Tensor:
        """One sample of a constant that has a dimension for the batch; all must be alike."""
        if len(constant) != self.batch or not torch.equal(constant, constant[:1].expand_as(constant)):
            raise NoFormError("it takes a constant that differs from sample to sample. Make it the same for all")
        return constant[0].to(self.like)

    def constant(self, value: Tensor) -> Affine:
        """A constant that has a dimension for the batch."""
        sample = self.sample(value)
        M = self.like.to_sparse().new_zeros(sample.numel(), self.width)
        return Affine(self, M, sample.reshape(-1), tuple(sample.shape))

    def model(self, y: Affine) -> StateSpace:
        """The StateSpace with this output; its blocks are the layers, the last one first."""
        layers = self.layers[::-1]
        sizes = [len(b) for _, _, b in layers]
        n = sum(sizes)
        # States in the order of their creation; turned around by layers, where does each one go?
        created = torch.arange(n, device=self.like.device).split(sizes[::-1])
        place = torch.empty(n, dtype=torch.int64, device=self.like.device)
        place[torch.cat((*created[::-1], place[:0]))] = torch.arange(n, device=place.device)
        B, A = self._split([M for _, M, _ in layers], place)
        D, C = self._split([y.M], place)
        b_x = torch.cat([*(b for _, _, b in layers), self.like])
        return StateSpace(A, B, C, D, b_x, y.c, [block for blocks, _, _ in layers for block in blocks])

    def _split(self, parts: list[Tensor], place: Tensor) -> tuple[Tensor, Tensor]:
        """Rows over [u; x], one part below the other, as a matrix for u and one for x in its last order."""
        height, rows, columns, values = 0, [place[:0]], [place[:0]], [self.like]
        for M in parts:
            i, j, v = entries(M)
            rows, columns, values = [*rows, i + height], [*columns, j], [*values, v]
            height += M.shape[0]
        i, j, v = torch.cat(rows), torch.cat(columns), torch.cat(values)
        of_u = j < self.p
        return (
            coo(i[of_u], j[of_u], v[of_u], (height, self.p)),
            coo(i[~of_u], place[j[~of_u] - self.p], v[~of_u], (height, len(place))),
        )


@dataclass(eq=False)
class Affine:
    """A tensor (batch, \\*features) whose samples, flattened, are M[u; x] + c; x are the states found so far."""

    net: Network
    M: Tensor
    c: Tensor
    features: tuple[int, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.net.batch, *self.features))

    @property
    def ndim(self) -> int:
        return 1 + len(self.features)

    @property
    def dtype(self) -> torch.dtype:
        return self.net.like.dtype

    @property
    def device(self) -> torch.device:
        return self.net.like.device

    def applied(self, L: Tensor, b: Tensor | None = None, features: tuple[int, ...] | None = None) -> Affine:
        """Lv + b for v flattened."""
        c = linear(self.c.unsqueeze(0), L, b).squeeze(0)
        return Affine(self.net, product(L, self.M), c, (len(c),) if features is None else features)

    def plus(self, other: Affine, factor: float = 1.0) -> Affine:
        """self + factor · other, of the same shape."""
        M, N = widened(self.M, self.net.width), widened(other.M, self.net.width)
        return replace(self, M=(M + factor * N).coalesce(), c=self.c + factor * other.c)

    def scaled(self, factors: Tensor) -> Affine:
        """Every entry times its own factor, (size,)."""
        values = self.M.values() * factors[self.M.indices()[0]]
        return replace(self, M=with_values(self.M, values), c=self.c * factors)

    def shifted(self, offsets: Tensor) -> Affine:
        """Every entry plus its own offset, (size,)."""
        return replace(self, c=self.c + offsets)

    def activated(self, activation: Activation) -> Affine:
        """φ of it, which is a block of states."""
        return replace(self.net.append((Block(activation, len(self.c)),), self.M, self.c), features=self.features)

    def modelled(self, space: StateSpace) -> Affine:
        """What the model makes of it; its states join those of the network."""
        space, width = space.to_sparse(), self.net.width
        z = self.applied(space.B, space.b_x)
        M = assemble([[widened(z.M, width), space.A]], [space.n], [width, space.n])
        with torch.no_grad():
            x = space.state(self.net.evaluated(self))
        return self.net.append(space.blocks, M, z.c, x).applied(space.C).plus(self.applied(space.D, space.b_y))

    def gathered(self, index: Tensor) -> Affine:
        """Entries of it, flattened, by their number; −1 stands for a zero."""
        flat, filled = index.reshape(-1), index.reshape(-1) >= 0
        ones = torch.ones(int(filled.sum()), dtype=self.dtype, device=self.device)
        S = coo(filled.nonzero().flatten(), flat[filled], ones, (len(flat), len(self.c)))
        return self.applied(S, features=tuple(index.shape))

    def numbers(self) -> Tensor:
        """A tensor of its shape that holds the place of each entry; to be moved about, and given to `moved`."""
        return torch.arange(self.net.batch * len(self.c), device=self.device).reshape(self.shape)

    def places(self, numbers: Tensor) -> Tensor:
        """The place in a sample that each of these numbers is of, (\\*features), alike in all samples; −1 for none."""
        first = numbers[:1]
        step = len(self.c) * torch.arange(self.net.batch, device=self.device).reshape(-1, *[1] * (numbers.dim() - 1))
        if len(numbers) != self.net.batch or not torch.equal(numbers, torch.where(first < 0, -1, first + step)):
            raise NoFormError("it does not keep the samples apart. Leave the first dimension to the batch")
        if bool((first >= len(self.c)).any()):
            raise NoFormError("it does not keep the samples apart. Leave the first dimension to the batch")
        return first[0]

    def moved(self, numbers: Tensor) -> Affine:
        """The value whose entries come from the places that these numbers say; −1 stands for a zero."""
        index = self.places(numbers)
        if torch.equal(index.reshape(-1), torch.arange(len(self.c), device=self.device)):
            return replace(self, features=tuple(index.shape))
        return self.gathered(index)

    def written(self, numbers: Tensor, other: Affine) -> Affine:
        """The value whose entries at these numbers are those of the other."""
        index = self.places(numbers).reshape(-1)
        select = torch.arange(len(self.c), device=self.device)
        select[index] = len(self.c) + torch.arange(len(index), device=self.device)
        return stacked([self, other]).gathered(select.reshape(self.features))


def stacked(values: Sequence[Affine]) -> Affine:
    """All entries of the values, flattened, one value after the other."""
    net, heights = values[0].net, [len(value.c) for value in values]
    M = assemble([[widened(value.M, net.width)] for value in values], heights, [net.width])
    return Affine(net, M, torch.cat([value.c for value in values]), (sum(heights),))


def widened(M: Tensor, width: int) -> Tensor:
    """M with columns of zeros for the states that have been found since."""
    return M if M.shape[1] == width else with_values(M, M.values(), width)
