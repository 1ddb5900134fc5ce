"""The states of a teacher: its inputs U, pre-activations Z, post-activations X and outputs Y, one column per sample."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._internal import store
from .._internal.errors import positive_int, takes, wrong
from ..training.evaluate import evaluating
from .recorder import Call, Recorder

_WHO = "get_states"
FLOATS = (torch.float32, torch.float64)
# The file of a folder of states that says what the others are, its format, and the matrices.
_HEADER, _FORMAT, _NAMES = "states.json", 1, ("X", "U", "Z", "Y")


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


def get_states(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Sequence[str | int] | None = None,
    skip_layers: int | None = None,
    dtype: torch.dtype | None = None,
    path: str | Path | None = None,
    max_memory: int = 1 << 32,
) -> States:
    """Run a teacher over a loader and collect what goes into its activations and what comes out.

    Z = A X + B U for an A and a B that hold the teacher's weights, if it is linear between its activations, and then
    Y = C X + D U.  Rows of X and Z are the activations' features, the last layer first.

    Arguments:
        model: any module: activations as modules or as functions, in place or not, residual, convolutional (features
            are flattened), exported, scripted; an `ImplicitModel` in it is one layer.  It runs in evaluation mode, in
            its own dtype and on its own device, and is left as it was.
        loader: batches of inputs, or (inputs, ...), batch first, as they come out of the loader.
        layers: which activations to take, in any order: names of modules, each of which gives the activations called
            in it, or numbers in the order of the calls.  A module without parameters and without children is taken
            from its input to its output, so that an activation of your own counts.  All by default.
        skip_layers: a module with more children than this is a stack of blocks, of each of which only the last
            activation is taken.
        dtype: of the states, float32 or float64; the teacher's by default, and float32 where it has less.
        path: a new folder, to which the states are streamed; they come back memory-mapped.
        max_memory: bytes of states to hold in memory, 4 GiB; beyond it they go to temporary files, memory-mapped.

    Returns:
        `States`: a dict of X (n, m), U (p, m), Z (n, m) and Y (q, m) for m samples, on the CPU.

    Raises:
        ArgumentError: no activation, a layer that is not there, a state that is NaN or infinite (the layer is named),
            batches that are no tensors; a folder that holds states already.

    Source: Tsai et al., State-driven Implicit Modeling for Sparsity and Robustness in Neural Networks,
        arXiv:2209.09389 (the state matrices).

    Example:
        >>> import torch
        >>> from implicitdl.sim import get_states
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> states = get_states(teacher, [torch.randn(4, 3), torch.randn(4, 3)])
        >>> {name: tuple(states[name].shape) for name in "XUZY"}
        {'X': (5, 8), 'U': (3, 8), 'Z': (5, 8), 'Y': (2, 8)}
        >>> torch.equal(states["X"], states["Z"].relu())
        True
    """
    _check(model, layers, skip_layers, dtype)
    max_memory = positive_int(_WHO, "max_memory", max_memory)
    folder = None if path is None else new_folder(_WHO, path)
    place = place_of(model)
    with Columns(folder, max_memory) as columns, evaluating(model):
        found: tuple[Layer, ...] = ()
        for batch, u in enumerate(_inputs(loader, place), start=1):
            recorder, y = _run(model, u, layers)
            picked = recorder.chosen(skip_layers)[::-1]
            layout = tuple(Layer(call.module, call.function, call.z.shape[1:].numel()) for call in picked)
            if batch == 1:
                found, batch_shape, affine = layout, tuple(u.shape), _affine(model, u, layers)
                dtype = dtype or (u.dtype if u.dtype in FLOATS else torch.float32)
            elif layout != found:
                raise wrong(
                    _WHO, f"the layers of the first batch, {_words(found)}", f"{_words(layout)} in batch {batch}",
                    "Choose with layers=[...] those that are called alike for every input.",
                )  # fmt: skip
            for name, rows in _rows(batch, u, picked, y).items():
                columns.append(name, torch.cat([part.to("cpu", dtype) for part in rows], dim=1))
        if not found:
            raise wrong(_WHO, "a loader with batches", "an empty one", "Check the data set and drop_last.")
        states = States(columns.finish(), found, affine, batch_shape)
        if folder is not None:
            save_header(folder, states)
    return states


def _check(model: Any, layers: Any, skip_layers: Any, dtype: Any) -> None:
    if not isinstance(model, nn.Module):
        raise wrong(_WHO, "model to be a Module", repr(model), "An exported program is one as program.module().")
    if dtype is not None and dtype not in FLOATS:
        raise wrong(_WHO, "dtype float32 or float64", dtype)
    if skip_layers is not None:
        positive_int(_WHO, "skip_layers", skip_layers)
        if layers is not None:
            raise wrong(_WHO, "layers or skip_layers", "both", "Leave one of them out.")


def place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module is, and in which dtype it computes."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def _inputs(loader: Iterable[Any], place: tuple[torch.device, torch.dtype]) -> Iterator[Tensor]:
    for batch in loader:
        u = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(u, Tensor) or u.dim() < 2 or len(u) == 0:
            got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise wrong(_WHO, "inputs of shape (batch ≥ 1, ...), first in their batch", got, "Collate them so.")
        yield u.to(*place)


def _run(model: nn.Module, u: Tensor, layers: Sequence[str | int] | None) -> tuple[Recorder, Tensor]:
    with takes(_WHO, "a teacher", u, "Pass the data that it was made for."):
        recorder = Recorder(model, layers)
        with recorder.recording():
            y = model(u.clone())  # the first activation may work in place on the input itself
    if not isinstance(y, Tensor) or y.dim() < 2 or len(y) != len(u):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise wrong(_WHO, f"a teacher that returns one tensor (batch={len(u)}, ...)", got, "Wrap it so that it does.")
    return recorder, y


def _affine(model: nn.Module, u: Tensor, layers: Sequence[str | int] | None) -> bool:
    """Whether the teacher maps u = 0 to anything but zeros: it has biases, in whatever form."""
    recorder, y = _run(model, torch.zeros_like(u), layers)
    return bool(y.any()) or any(bool(call.z.any()) for call in recorder.calls)


def _rows(batch: int, u: Tensor, picked: list[Call], y: Tensor) -> dict[str, list[Tensor]]:
    """What a batch adds to each matrix, (batch, features) in the order of the rows; finite, or the error says where."""
    named: dict[str, list[tuple[Call | str, Tensor]]] = {
        "X": [(call, call.x) for call in picked],
        "U": [("the inputs", u)],
        "Z": [(call, call.z) for call in picked],
        "Y": [("the outputs", y)],
    }
    for where, state in (pair for pairs in named.values() for pair in pairs):
        if state.dim() < 2 or len(state) != len(u):
            raise wrong(
                _WHO, f"a row per sample in every activation (batch={len(u)}, ...)", f"{tuple(state.shape)} in {where}",
                "Choose other layers with layers=[...].",
            )  # fmt: skip
        if not torch.isfinite(state).all():
            bad = int((~torch.isfinite(state)).flatten(1).any(dim=1).sum())
            raise wrong(
                _WHO, "finite states", f"NaN or infinite values in {where}, in {bad} samples of batch {batch}",
                "Clean the data, or train the teacher again.",
            )  # fmt: skip
    return {name: [state.flatten(1) for _, state in pairs] for name, pairs in named.items()}


def _words(layers: Sequence[Layer]) -> str:
    return ", ".join(f"{layer} of {layer.features}" for layer in reversed(layers))


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
        if not self._files:
            return {name: torch.cat(parts).t() for name, parts in self._parts.items()}
        with self._writing():
            return {name: file.finish() for name, file in self._files.items()}

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
        got = "states in it" if (folder / _HEADER).exists() else "other files in it"
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
        "shapes": {name: list(states[name].shape) for name in _NAMES},
        "layers": [list(layer) for layer in states.layers],
        "affine": states.affine,
        "batch_shape": list(states.batch_shape),
    }
    store.write_file(folder / _HEADER, (json.dumps(header, indent=1) + "\n").encode())


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
    expected, do = f"a folder of states, with {_HEADER}", "Give the path that they were saved to."
    if not (folder / _HEADER).is_file():
        got = "a file" if folder.is_file() else "none" if folder.is_dir() else "nothing there"
        raise _wrong(folder, expected, got, do)
    try:
        header: dict[str, Any] = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
        version = header["format"]
        states = {name: _load(folder, name, tuple(header["shapes"][name])) for name in _NAMES}
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
