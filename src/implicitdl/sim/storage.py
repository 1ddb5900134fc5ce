"""States of a teacher in memory or on disk: columns that grow sample by sample."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._internal import store
from .._internal.errors import wrong

FILE = "states.json"
NAMES = ("X", "U", "Z", "Y")
FLOATS = (torch.float32, torch.float64)
_FORMAT = 1


class Layer(NamedTuple):
    """An activation of the teacher: where it is called, what it is called, how many features it has."""

    module: str
    function: str
    features: int

    def __str__(self) -> str:
        return f"'{self.module}' ({self.function})"


class States(dict[str, Tensor]):
    """X (n, m), U (p, m), Z (n, m), Y (q, m): features by samples, the last layer first.

    Attributes:
        layers: whose features the rows of X and Z are, in their order.
        affine: whether the teacher has biases.
        batch_shape: (batch, ...), the shape of the first batch of inputs.
    """

    def __init__(
        self, states: dict[str, Tensor], layers: tuple[Layer, ...], affine: bool, batch_shape: tuple[int, ...]
    ) -> None:
        super().__init__(states)
        self.layers, self.affine, self.batch_shape = layers, affine, batch_shape


class Columns:
    """Matrices by name that grow sample by sample.

    Arguments:
        folder: where to write X.npy and so on; None holds them in memory.
        max_memory: bytes, beyond which what is held in memory moves to temporary files.
    """

    def __init__(self, folder: Path | None, max_memory: int) -> None:
        self._folder, self._room = folder, max_memory
        self._parts: dict[str, list[Tensor]] = {}
        self._files: dict[str, _File] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Columns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if kind is not None and self._folder is not None:  # half a collection is of no use
            with contextlib.suppress(OSError):
                for name in self._files:
                    (self._folder / f"{name}.npy").unlink()
                self._folder.rmdir()

    def append(self, name: str, rows: Tensor) -> None:
        """Some samples more, (samples, features)."""
        self._parts.setdefault(name, []).append(rows)
        self._room -= rows.nbytes
        if self._folder is not None or self._room < 0:
            with self._writing():
                for moved, parts in self._parts.items():
                    for part in parts:
                        self._file(moved, part).write(part)
                    parts.clear()

    def finish(self) -> dict[str, Tensor]:
        """All of them, (features, samples)."""
        with self._writing():
            return {
                name: self._files[name].finish() if name in self._files else torch.cat(parts).t()
                for name, parts in self._parts.items()
            }

    def _file(self, name: str, like: Tensor) -> _File:
        if name not in self._files:
            folder = self._folder
            opened = tempfile.TemporaryFile if folder is None else (folder / f"{name}.npy").open
            self._files[name] = _File(self._stack.enter_context(opened("w+b")), like)
        return self._files[name]

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return store.writing(self._folder or Path(tempfile.gettempdir()))


class _File:
    """A .npy file of a (features, samples) array in Fortran order: one sample lies after the other, as they come."""

    def __init__(self, file: IO[bytes], like: Tensor) -> None:
        self._file, self._features, self._samples = file, like.shape[1], 0
        self._dtype = like.numpy().dtype
        self._head()

    def _head(self) -> None:
        # NumPy leaves room in the header for a last axis that grows, so that its length does not change.
        self._file.seek(0)
        array = {"descr": self._dtype.str, "fortran_order": True, "shape": (self._features, self._samples)}
        np.lib.format.write_array_header_1_0(self._file, array)
        self._start = self._file.tell()
        self._file.seek(0, os.SEEK_END)

    def write(self, rows: Tensor) -> None:
        self._file.write(rows.contiguous().numpy().data)
        self._samples += len(rows)

    def finish(self) -> Tensor:
        """Written to the disk, and mapped."""
        self._head()
        self._file.flush()
        os.fsync(self._file.fileno())
        shape = (self._features, self._samples)
        # Copy on write: whoever works in place on a state does not change the file.
        return torch.from_numpy(
            np.memmap(self._file, self._dtype, mode="c", offset=self._start, shape=shape, order="F")
        )


def new_folder(who: str, path: str | os.PathLike[str]) -> Path:
    """A folder for states, made."""
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        got = "states in it" if (folder / FILE).exists() else "other files in it"
        do = "Name another folder; states that are there are read with states_data_path, or load_states."
        raise wrong(who, f"a new folder, not '{folder}'", got, do)
    with store.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_header(folder: Path, states: States) -> None:
    """The last file, which says that the others are whole."""
    header = {
        "kind": "states",
        "format": _FORMAT,
        "shapes": {name: list(states[name].shape) for name in NAMES},
        "layers": [list(layer) for layer in states.layers],
        "affine": states.affine,
        "batch_shape": list(states.batch_shape),
    }
    store.write_file(folder / FILE, (json.dumps(header, indent=1) + "\n").encode())


def load_states(path: str | os.PathLike[str]) -> States:
    """The states in a folder that `get_states` wrote, memory-mapped.

    Arguments:
        path: the folder.

    Returns:
        `States`, on the CPU; changing them in place does not change the files.

    Raises:
        CheckpointError: no states there, only half of them, or files that do not belong together.

    Example:
        >>> import tempfile, torch
        >>> from implicitdl.sim import get_states, load_states
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     states = get_states(teacher, [torch.randn(4, 3)], path=folder + "/states")
        ...     same = load_states(folder + "/states")
        >>> torch.equal(states["X"], same["X"]), same.affine
        (True, True)
    """
    folder = Path(path)
    expected, do = f"a folder of states, with {FILE}", "Give the path that they were saved to."
    if not (folder / FILE).is_file():
        got = "a file" if folder.is_file() else "none" if folder.is_dir() else "nothing there"
        raise _wrong(folder, expected, got, do)
    try:
        header: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        version = header["format"]
        states = {name: _load(folder, name, tuple(header["shapes"][name])) for name in NAMES}
        layers = tuple(Layer(*layer) for layer in header["layers"])
        affine, batch_shape = bool(header["affine"]), tuple(header["batch_shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise _wrong(folder, "whole states", f"damaged ones ({reason})", "Copy them again, or collect them.") from error
    if version != _FORMAT:
        raise _wrong(folder, f"format {_FORMAT}", version, "Update implicitdl to read it.")
    return States(states, layers, affine, batch_shape)


def _load(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    array = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
    if array.shape != shape:
        raise ValueError(f"{name}.npy of shape {array.shape} instead of {shape}")
    return torch.from_numpy(array)


def _wrong(folder: Path, expected: str, got: object, do: str) -> store.CheckpointError:
    return store.CheckpointError(str(wrong(f"states '{folder}'", expected, got, do)))
