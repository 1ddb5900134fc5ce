"""The teacher of `sim`: a run of ours, an exported program, or weights with an architecture."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .._internal.errors import ArgumentError, wrong
from ..activations import MODULES
from ..nn import ImplicitModel
from ..sim.states import place_of
from ..statespace import StateSpace, from_module
from ..statespace.matrices import count_nonzero
from . import folder
from .options import SimOptions

WHO = SimOptions.WHO
_ACTIVATIONS = {activation.name: kind for kind, activation in MODULES.items()}


def load(path: str, layers: str | None, activation: str) -> nn.Module:
    """The teacher at `path`.

    Arguments:
        path: a run's folder; a folder of `save_pretrained`; a .pt2 file; a .safetensors file.
        layers: sizes "784-64-10" of the network whose weights a .safetensors file has; else None.
        activation: its φ, by name.
    """
    where = Path(path)
    weights = where.suffix == ".safetensors"
    if (layers is not None) != weights:
        got = "a .safetensors file without --layers" if weights else "--layers without one"
        raise wrong(WHO, "--layers together with a .safetensors file", got, "Sizes such as --layers 784-64-10.")
    if weights:
        assert layers is not None
        return _network(where, layers, activation)
    if where.suffix == ".pt2":
        return _exported(where)
    if folder.is_run(where):
        model = folder.best(WHO, where, folder.read(WHO, where))
        if not isinstance(model, ImplicitModel):
            raise wrong(WHO, "a teacher with states x = φ(z)", f"a {type(model).__name__}", "Take another run.")
        return model
    return ImplicitModel.from_pretrained(where)  # refuses what is no such folder, pickles by name


def split_seed(path: str) -> int:
    """Of the data that the teacher has been trained on, where it is a run of ours or in one's folder; else 0."""
    runs = [where for where in (Path(path), Path(path).parent) if folder.is_run(where)]
    return folder.read(WHO, runs[0]).split_seed if runs else 0


def weights_of(teacher: nn.Module) -> int:
    """Weights that are not zero, biases not counted."""
    return sum(int((weight != 0).sum()) for weight in teacher.parameters() if weight.dim() > 1)


def statespace(teacher: nn.Module, images: Tensor) -> StateSpace | None:
    """The teacher as matrices, for inputs such as these, where each of its weights is one of their entries; else None.

    A weight of a convolution is many of them, and those that a max-pooling adds are none of its own.
    """
    if isinstance(teacher, ImplicitModel):
        return teacher.statespace().detach()
    try:
        space = from_module(teacher, images.to(*place_of(teacher))).detach().to_dense()
    except ArgumentError:  # it has no such form
        return None
    return space if sum(map(count_nonzero, space.matrices)) == weights_of(teacher) else None


def _network(path: Path, layers: str, activation: str) -> nn.Module:
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)+", layers):
        raise wrong(WHO, "--layers with sizes such as 784-64-10", repr(layers))
    tensors = _tensors(path)
    matrices = [name for name in sorted(tensors, key=_natural) if tensors[name].dim() == 2]
    sizes = list(pairwise(int(size) for size in layers.split("-")))
    found = [tuple(tensors[name].shape) for name in matrices]
    if found != [(out, into) for into, out in sizes]:
        expected = ", ".join(f"{out} × {into}" for into, out in sizes)
        got = ", ".join(f"{name} {rows} × {columns}" for name, (rows, columns) in zip(matrices, found, strict=True))
        raise wrong(WHO, f"weights of {expected} in '{path}'", got or "no matrices", "Check --layers.")
    parts: list[nn.Module] = [nn.Flatten()]
    for name, (into, out) in zip(matrices, sizes, strict=True):
        bias = tensors.get(re.sub("weight$", "bias", name)) if name.endswith("weight") else None
        linear = nn.Linear(into, out, bias=bias is not None, dtype=tensors[name].dtype)
        linear.load_state_dict({"weight": tensors[name]} | ({} if bias is None else {"bias": bias}))
        parts += [linear, _ACTIVATIONS[activation]()]
    return nn.Sequential(*parts[:-1])


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise wrong(WHO, f"a whole .safetensors file at '{path}'", f"none ({error})", "Check the path.") from error


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers: layer 10 comes after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _exported(path: Path) -> nn.Module:
    """An exported program, without unpickling anything in it that is not a tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise wrong(WHO, f"an exported program at '{path}'", f"none ({error})", "See torch.export.save.") from error
    objects = [name for name in names if re.search(r"/constants/(?!tensor_|.*\.json$)", name)]
    if objects:
        do = "Pickles run code when they are read: export a network whose constants are tensors."
        raise wrong(WHO, "an exported program of tensors", f"the pickled object {objects[0]}", do)
    try:
        with _tensors_only():
            program = torch.export.load(path)
    except Exception as error:  # whatever a damaged or a foreign archive makes torch stumble over
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise wrong(WHO, f"an exported program at '{path}'", f"one that cannot be read ({reason})") from error
    module = program.module()
    given = program.example_inputs
    flat = given is not None and given[0] and given[0][0].dim() == 2
    return nn.Sequential(nn.Flatten(), module) if flat else module


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """torch.load reads tensors and nothing else, also where its caller asks it for more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
