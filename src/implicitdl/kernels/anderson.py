"""The door of ``anderson.c``: a step of Anderson acceleration that reads every vector of its memory once a pass."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .loops import loops, reachable, threads

_MOST = 32  # differences, in anderson.c


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_ssize_t) for name in ("batch", "d", "room", "held")),
        *((name, ctypes.c_void_p) for name in ("x", "r", "f", "next", "gram", "along", "sizes", "best", "depth")),
        *((name, ctypes.c_double) for name in ("growth", "damping", "ridge")),
        ("threads", ctypes.c_int32),
    )


@dataclass
class Memory:
    """The last residuals and values of f, newest first, and the products of their differences.

    Vectors stay where they were written: when samples leave, only the table of where they are becomes shorter.  C is
    called for what it `serves` only.
    """

    growth: float
    damping: float
    vectors: Tensor  # (m + 1, batch, d)  for residuals, taken in turn
    gram: Tensor  # (batch, m, m), and so on, as in anderson.c
    along: Tensor
    best: Tensor
    depth: Tensor
    steps: int = 0
    sizes: Tensor | None = None  # (2, batch)  of the present vectors, once they have been looked at
    values: list[_Value] = field(default_factory=list)  # f(x), held so that they stay
    r: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.uintp))  # (held + 1, batch)  addresses
    f: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.uintp))

    @classmethod
    def of(cls, x: Tensor, memory: int, growth: float, damping: float) -> Memory | None:
        """An empty one for states like x, (batch, d); None where torch has to do it."""
        if torch.is_grad_enabled() or memory > _MOST or not reachable(x) or x.dim() != 2:
            return None
        if loops(x.dtype) is None:
            return None
        batch, nowhere = len(x), np.empty((0, len(x)), np.uintp)
        # Numpy asks the system for large pages, of which a solve then faults in a few and not thousands.
        vectors = torch.from_numpy(np.empty((memory + 1, *x.shape), np.float32 if x.itemsize == 4 else np.float64))
        figures = x.new_zeros(0, dtype=torch.float64)
        return cls(
            growth, damping, vectors,
            gram=figures.new_zeros(batch, memory, memory), along=figures.new_zeros(batch, memory),
            best=figures.new_full((batch,), torch.inf), depth=x.new_zeros(batch, dtype=torch.int64),
            r=nowhere, f=nowhere,
        )  # fmt: skip

    def serves(self, x: Tensor, fx: Tensor) -> bool:
        """Whether x and f(x) are those of its samples, in its precision and in reach, and the earlier values are too.

        They are the user's tensors, whose storage may have been resized since.
        """
        shape = (len(self.gram), self.vectors.shape[2])
        own = reachable(self.vectors, x, fx) and x.shape == shape and fx.shape == shape
        return own and all(value.is_there() for value in self.values)

    def look(self, x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor]:
        """‖f(x) − x‖ and ‖f(x)‖ of every sample, (batch,)."""
        x, value, held = x.contiguous(), _Value(fx), len(self.vectors) - 1
        self.values = [value, *self.values[:held]]
        self.r = np.vstack([_rows(self.vectors[self.steps % len(self.vectors)], len(x)), self.r[:held]])
        self.f = np.vstack([_rows(value.tensor, len(x)), self.f[:held]])
        self.sizes = x.new_empty(2, len(x), dtype=torch.float64)
        self._call("look", x)
        change, size = self.sizes.to(x.dtype)
        return change, size

    def step(self, x: Tensor, fx: Tensor) -> Tensor:
        """The next x."""
        if self.sizes is None:
            self.look(x, fx)
        following = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._call("step", following)
        self.sizes, self.steps, held = None, self.steps + 1, len(self.vectors) - 1
        self.r, self.f = self.r[:held], self.f[:held]
        return following

    def take(self, rows: Tensor) -> Memory:
        """That of some of the samples."""
        parts = {name: getattr(self, name).index_select(0, rows) for name in ("gram", "along", "best", "depth")}
        sizes = None if self.sizes is None else self.sizes[:, rows].contiguous()
        return replace(self, **parts, sizes=sizes, r=self.r[:, rows.numpy()], f=self.f[:, rows.numpy()])

    def _call(self, function: str, x: Tensor) -> None:
        assert self.sizes is not None, "looked at before a step"
        batch, d = x.shape
        r, f = np.ascontiguousarray(self.r), np.ascontiguousarray(self.f)
        problem = _Problem(
            batch, d, len(self.vectors) - 1, len(r) - 1, x.data_ptr(), r.ctypes.data, f.ctypes.data, x.data_ptr(),
            self.gram.data_ptr(), self.along.data_ptr(), self.sizes.data_ptr(), self.best.data_ptr(),
            self.depth.data_ptr(), self.growth, self.damping, 10 * torch.finfo(x.dtype).eps,
            min(batch, threads(batch * d)),
        )  # fmt: skip
        compiled = loops(x.dtype)
        assert compiled is not None, "asked for at the beginning"
        compiled[function](ctypes.byref(problem))


class _Value:
    """A tensor of its own over the numbers of f(x): other strides given to the user's leave it alone."""

    def __init__(self, fx: Tensor) -> None:
        self.tensor = fx.detach().contiguous()
        self.address = self.tensor.data_ptr()
        self.end = self.tensor.element_size() * (self.tensor.storage_offset() + self.tensor.numel())

    def is_there(self) -> bool:
        return self.tensor.data_ptr() == self.address and self.tensor.untyped_storage().nbytes() >= self.end


def _rows(x: Tensor, count: int) -> np.ndarray:
    """Where the first rows of x are."""
    start, stride = x.data_ptr(), x.shape[1] * x.element_size()
    return np.arange(start, start + count * stride, stride, dtype=np.uintp)
