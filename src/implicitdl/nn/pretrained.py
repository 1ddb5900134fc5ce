"""Models on disk: tensors in safetensors, everything else in JSON; and torchidl's state_dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import _store, activations, adjoints, constraints, solvers
from .._checks import wrong
from . import function

if TYPE_CHECKING:
    from .model import ImplicitModel


class Pretrained(nn.Module):
    """A Module that is written to a folder, and rebuilt from it (`load`) by calling its class with what was saved.

    A subclass keeps its constructor's arguments as attributes of the same names: those in ``saved_arguments`` as JSON
    holds them, and those of ``_OBJECTS``, which it has or has not, as described there.
    """

    saved_arguments: ClassVar[tuple[str, ...]]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` to a folder; no pickle, and never half a model."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        _store.save(folder, tensors, config(self))


Model = TypeVar("Model", bound=Pretrained)


def load(cls: type[Model], folder: str | Path, **own: Any) -> Model:
    """Rebuild a model; ``own`` are the user's classes and objects, which come before what was saved."""
    tensors, saved = _store.load(folder, kind=cls.__name__)
    return build(cls, tensors, saved, str(folder), **own)


def build(cls: type[Model], tensors: dict[str, Tensor], saved: dict[str, Any], where: str, **own: Any) -> Model:
    arguments = dict(saved["arguments"])
    dtype = getattr(torch, arguments.pop("dtype"))
    for name, kind in _OBJECTS.items():
        if name in saved:
            given = own.get(name)
            arguments[name] = given if given is not None else kind.revive(where, name, saved[name], kind.known)
    model = cls(**arguments).to(dtype)
    model.load_state_dict(tensors)
    return model


def config(model: Pretrained) -> dict[str, Any]:
    arguments = {name: getattr(model, name) for name in model.saved_arguments}
    arguments["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    objects = {name: kind.describe(model) for name, kind in _OBJECTS.items() if hasattr(model, name)}
    return {"kind": type(model).__name__, "arguments": arguments} | objects


def split_bias_columns(module: ImplicitModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load torchidl's layout as it is: there the bias is a last column of B and D, fed with a constant 1."""
    B = state_dict.get(prefix + "B")
    if not module.bias or prefix + "b_x" in state_dict or B is None or B.shape[1] != module.input_dim + 1:
        return
    state_dict[prefix + "B"], state_dict[prefix + "b_x"] = B[:, :-1], B[:, -1]
    D = state_dict.get(prefix + "D")
    state_dict[prefix + "b_y"] = B.new_zeros(module.output_dim) if D is None else D[:, -1]
    if D is not None:
        state_dict[prefix + "D"] = D[:, :-1]


def _name_of_activation(model: ImplicitModel) -> str | None:
    known = activations.BUILTIN.get(model.activation.name) is model.activation
    from_f = not known and model.activation.name == model.f.__qualname__
    return None if from_f else model.activation.name


def _describe(settings: Any) -> dict[str, Any]:
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {"class": type(settings).__name__} | {
        name: _describe(value) if dataclasses.is_dataclass(value) else value for name, value in fields.items()
    }


def _by_name(where: str, what: str, name: str | None, known: dict[str, Any]) -> Any:
    if name is None:
        return None
    if name not in known:
        raise wrong(
            f"from_pretrained('{where}')", f"{what}=… beside the folder, since the model was saved with its own",
            f"none for {name!r}", f"Pass {what}={name}.",
        )  # fmt: skip
    return known[name]


def _revived(where: str, what: str, saved: dict[str, Any], known: dict[str, Any]) -> Any:
    fields = {
        name: _revived(where, what, value, _SETTINGS) if isinstance(value, dict) else value
        for name, value in saved.items()
        if name != "class"
    }
    return _by_name(where, what, saved["class"], known)(**fields)


def _classes(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, type)}


_SETTINGS = _classes(solvers) | _classes(adjoints)


class _Object(NamedTuple):
    """An argument that JSON cannot hold: the library's own by name, how to describe one, how to bring it back."""

    known: dict[str, Any]
    describe: Callable[[Any], Any]
    revive: Callable[..., Any]


_OBJECTS = {
    "f": _Object(_classes(function), lambda model: model.f.__name__, _by_name),
    # None: it comes with f, so that it need not be given beside it.
    "activation": _Object(activations.BUILTIN, lambda model: _name_of_activation(model), _by_name),
    "constraint": _Object(_classes(constraints), lambda model: type(model.constraint).__name__, _by_name),
    "solver": _Object(_SETTINGS, lambda model: _describe(model.solver), _revived),
    "adjoint": _Object(_SETTINGS, lambda model: _describe(model.adjoint), _revived),
}
