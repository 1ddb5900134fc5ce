"""An ImplicitModel on disk: tensors in safetensors, everything else in JSON; and torchidl's state_dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _store, activations, adjoints, constraints, solvers
from .._checks import wrong
from . import function

if TYPE_CHECKING:
    from .model import ImplicitModel


def save(model: ImplicitModel, folder: str | Path) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    _store.save(folder, tensors, config(model))


def load(cls: type[ImplicitModel], folder: str | Path, **own: Any) -> ImplicitModel:
    """Rebuild a model; ``own`` are the user's classes and objects, which come before what was saved."""
    tensors, saved = _store.load(folder, kind=cls.__name__)
    return build(cls, tensors, saved, str(folder), **own)


def build(
    cls: type[ImplicitModel], tensors: dict[str, Tensor], saved: dict[str, Any], where: str, **own: Any
) -> ImplicitModel:
    arguments = dict(saved["arguments"])
    for name, (known, revive) in _REVIVERS.items():
        given = own.get(name)
        arguments[name] = given if given is not None else revive(where, name, saved[name], known)
    arguments["dtype"] = getattr(torch, arguments["dtype"])
    model = cls(**arguments)
    model.load_state_dict(tensors)
    return model


def config(model: ImplicitModel) -> dict[str, Any]:
    names = ("input_dim", "output_dim", "hidden_dim", "no_D", "bias", "is_low_rank", "rank", "on_failure")
    # A constraint object may have been given with a κ of its own; that is the one which holds.
    arguments = {name: getattr(model, name) for name in names} | {"kappa": model.constraint.kappa}
    arguments["dtype"] = str(model.B.dtype).removeprefix("torch.")
    return {
        "kind": type(model).__name__,
        "arguments": arguments,
        "f": model.f.__name__,
        # None: it comes with f, so that it need not be given beside it.
        "activation": _name_of_activation(model),
        "constraint": type(model.constraint).__name__,
        "solver": _describe(model.solver),
        "adjoint": _describe(model.adjoint),
    }


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
_REVIVERS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "f": (_classes(function), _by_name),
    "activation": (activations.BUILTIN, _by_name),
    "constraint": (_classes(constraints), _by_name),
    "solver": (_SETTINGS, _revived),
    "adjoint": (_SETTINGS, _revived),
}
