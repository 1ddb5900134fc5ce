"""The states of a teacher: its inputs U, pre-activations Z, post-activations X and outputs Y, one column per sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.errors import positive_int, takes, wrong
from ..training.evaluate import evaluating
from .choice import chosen, whole_modules
from .record import Call, Recorder
from .storage import FLOATS, Columns, Layer, States, new_folder, save_header

_WHO = "get_states"


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
    whole = whole_modules(model, layers)
    with Columns(folder, max_memory) as columns, evaluating(model):
        found: tuple[Layer, ...] = ()
        for batch, u in enumerate(_inputs(loader, place), start=1):
            calls, y = _run(model, u, whole)
            picked = chosen(_WHO, model, calls, layers, skip_layers)[::-1]
            layout = tuple(Layer(call.module, call.function, call.z.shape[1:].numel()) for call in picked)
            if batch == 1:
                found, batch_shape, affine = layout, tuple(u.shape), _affine(model, u, whole)
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


def _run(model: nn.Module, u: Tensor, whole: set[str]) -> tuple[list[Call], Tensor]:
    recorder = Recorder(whole)
    with takes(_WHO, "a teacher", u, "Pass the data that it was made for."), recorder.inside(model):
        y = model(u.clone())  # the first activation may work in place on the input itself
    if not isinstance(y, Tensor) or y.dim() < 2 or len(y) != len(u):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise wrong(_WHO, f"a teacher that returns one tensor (batch={len(u)}, ...)", got, "Wrap it so that it does.")
    return recorder.calls, y


def _affine(model: nn.Module, u: Tensor, whole: set[str]) -> bool:
    """Whether the teacher maps u = 0 to anything but zeros: it has biases, in whatever form."""
    calls, y = _run(model, torch.zeros_like(u), whole)
    return bool(y.any()) or any(bool(call.z.any()) for call in calls)


def _rows(batch: int, u: Tensor, picked: list[Call], y: Tensor) -> dict[str, list[Tensor]]:
    """What a batch adds to each matrix, (batch, features) in the order of the rows; finite, or the error says where."""
    named = {
        "X": [(str(call), call.x) for call in picked],
        "U": [("the inputs", u)],
        "Z": [(str(call), call.z) for call in picked],
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
