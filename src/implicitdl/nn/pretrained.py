"""Models on disk: tensors in safetensors, everything else in JSON."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from .. import activations, adjoints, constraints, solvers
from .._internal import store
from .._internal.errors import wrong
from .._internal.store import CheckpointError, Form, quoted
from ..adjoints import Adjoint
from ..constraints import Constraint, WeightedRowScaling
from ..solvers import Solver
from . import function, schema
from .function import ImplicitFunction

# An adjoint has a solver, which may have one for what it finds slow; more levels are not made by hand.
_LEVELS = 8
# What a constructor, the library's or torch's, raises for arguments that do not go together.
_REFUSALS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


class NotRebuiltError(CheckpointError):
    """A model that its class, called with what would be saved of it, does not make again."""


class Pretrained(nn.Module):
    """A Module that is written to a folder, and rebuilt from it (`load`) by calling its class with what was saved.

    A subclass keeps its constructor's arguments as attributes of the same names: those in ``saved_arguments`` as JSON
    holds them, and of f, activation, constraint, solver and adjoint those that its constructor takes.
    """

    saved_arguments: ClassVar[tuple[str, ...]]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` to a folder; no pickle, and never half a model.

        What is written can be read: a model is refused whose weights are not finite, of several dtypes, on the meta
        device, or other tensors than its class has.  So are pruned and parametrized ones, until
        ``torch.nn.utils.prune.remove`` or ``torch.nn.utils.parametrize.remove_parametrizations`` has made the
        weights that they compute with their own.

        Raises:
            CheckpointError: it could not be read again, or the folder cannot be written; what was there before stays.
        """
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        _refuse_what_is_not_rebuilt(self, str(folder), tensors)
        store.save(folder, tensors, config(self))


Model = TypeVar("Model", bound=Pretrained)


def load(cls: type[Model], folder: str | Path, **own: Any) -> Model:
    """Rebuild a model; ``own`` are the user's classes and objects, which come before what was saved.

    Everything that the folder says is checked before it is believed: the configuration against the annotations of
    the classes that it names, and the tensors' names, shapes and dtypes against a model without memory.
    """
    with store.opened(folder, kind=cls.__name__) as checkpoint:
        try:
            arguments, dtype = _arguments(cls, checkpoint.meta, checkpoint.forms, own)
            _check_forms(cls, arguments, dtype, checkpoint.forms)
        except _UnfitError as error:
            expected, got, *do = error.args
            given = any(value is not None for value in own.values())
            raise checkpoint.wrong(expected, got, do[0] if do else _GIVEN if given else _DAMAGED) from error
        tensors = checkpoint.tensors()
        for name, tensor in tensors.items():
            if (bad := _not_finite(tensor)) is not None:
                raise checkpoint.wrong(f"finite weights in '{name}'", bad, "Take an earlier checkpoint.")
        try:
            model = cls(**arguments).to(getattr(torch, dtype))
            model.load_state_dict(tensors)
        except _REFUSALS as error:
            raise checkpoint.wrong(f"the weights of a {cls.__name__}", _first_line(error)) from error
    return model


def config(model: Pretrained) -> dict[str, Any]:
    arguments = {name: getattr(model, name) for name in model.saved_arguments}
    arguments["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    objects = {name: _DESCRIBED[name](model) for name in _objects(type(model))}
    return {"kind": type(model).__name__, "arguments": arguments} | objects


class _UnfitError(Exception):
    """What was expected, what was there instead, and what to do, where there is something special to do."""


def _objects(cls: type[Pretrained]) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name in _DESCRIBED]


def _refuse_what_is_not_rebuilt(model: Pretrained, folder: str, tensors: dict[str, Tensor]) -> None:
    def refuse(kind: type[CheckpointError], expected: str, got: str, do: str = "") -> CheckpointError:
        return kind(str(wrong(f"save_pretrained('{folder}')", expected, got, do)))

    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        do = "Give it weights first: model.to_empty(device='cpu'), and load_state_dict."
        raise refuse(CheckpointError, "a model with weights", "one on the meta device", do)
    if any(parametrize.is_parametrized(part) for part in model.modules()):
        do = "Make its weights permanent first: torch.nn.utils.parametrize.remove_parametrizations(module, name)."
        raise refuse(NotRebuiltError, "a model with weights of its own", "a parametrized one", do)
    if prune.is_pruned(model):
        do = "Make its weights permanent first: torch.nn.utils.prune.remove(module, name)."
        raise refuse(NotRebuiltError, "a model with weights of its own", "a pruned one", do)
    for name, tensor in tensors.items():
        if (bad := _not_finite(tensor)) is not None:
            raise refuse(CheckpointError, f"finite weights in '{name}'", bad, "Save it before it diverges.")
    forms = {name: Form.of(tensor) for name, tensor in tensors.items()}
    own = {name: getattr(model, name) for name in _objects(type(model))}
    try:
        _check_forms(type(model), *_arguments(type(model), config(model), forms, own), forms)
    except _UnfitError as error:
        expected, got, *_ = error.args
        do = "Build it so, or save its state_dict with safetensors.torch.save_file."
        raise refuse(NotRebuiltError, expected, got, do) from error


def _arguments(
    cls: type[Pretrained], saved: Mapping[str, Any], forms: Mapping[str, Form], own: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """What to call the class with, and the dtype of the weights."""
    entries = _fitting("a configuration", saved, schema.of_config(cls))
    arguments = _fitting(f"arguments of {cls.__name__}", entries["arguments"], schema.of_arguments(cls))
    dtype = arguments.pop("dtype")
    # Every size is one of a tensor, or tells how many layers there are.
    sizes = [size for form in forms.values() for size in form.shape if math.prod(form.shape)]
    largest = max(sizes, default=0) + len(forms)
    for name, value in arguments.items():
        if isinstance(value, int) and value > largest:
            raise _UnfitError(f"sizes of at most {largest}, as the weights have", f"{name}={value}")
    if "f" in entries:
        arguments["f"] = f = own["f"] or _known("f", entries["f"], _FUNCTIONS)
        if not (isinstance(f, type) and issubclass(f, ImplicitFunction)):
            raise _UnfitError("f to be a subclass of ImplicitFunction", quoted(f))
        name = entries["activation"]
        chosen = own["activation"] or (f.activation() if name is None else None)
        arguments["activation"] = chosen or _known("activation", name, activations.BUILTIN)
    if "constraint" in entries:
        arguments["constraint"] = _constraint(arguments, entries["constraint"], own["constraint"])
    for name in entries.keys() & {"solver", "adjoint"}:
        known = _SOLVERS if name == "solver" else _ADJOINTS
        arguments[name] = own[name] or _revived(name, entries[name], known)
    return arguments, dtype


def _fitting(what: str, entries: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return schema.converted(entries, fields)
    except ValueError as error:
        raise _UnfitError(f"{what} as it is saved", f"another ({_first_line(error)})") from error


def _known(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        name = quoted(name)[1:-1]
        do = f"Pass {what}={name}."
        raise _UnfitError(
            f"{what}=… beside the folder, since the model was saved with its own", f"none for '{name}'", do
        )
    return known[name]


def _constraint(arguments: dict[str, Any], saved: Any, own: Any) -> Constraint:
    """With its κ and largest slope, which need not be that of φ, and with room for the weights of one that has such."""
    entries = _fitting("a constraint", saved, {"name": str, "lipschitz": float, "weighted": bool})
    kind = own or _known("constraint", entries["name"], _CONSTRAINTS)
    if isinstance(kind, Constraint):
        return kind
    if not (isinstance(kind, type) and issubclass(kind, Constraint)):
        raise _UnfitError("constraint to be a Constraint", quoted(kind))
    settings: dict[str, Any] = {"kappa": arguments["kappa"]}
    if not kind.triangular:
        settings["lipschitz"] = max(entries["lipschitz"], arguments["activation"].lipschitz)
    if entries["weighted"] and issubclass(kind, WeightedRowScaling):
        settings["weights"] = torch.ones(arguments["hidden_dim"], dtype=torch.get_default_dtype(), device="cpu")
    return _called(kind, settings)


def _revived(what: str, saved: Any, known: Mapping[str, Any], level: int = 0) -> Any:
    """A solver or an adjoint from its settings."""
    entries = dict(saved)
    name = entries.pop("class", None)
    if not isinstance(name, str) or level > _LEVELS:
        raise _UnfitError(f"the name of a class for the {what}, at most {_LEVELS} deep", quoted(name))
    kind = _known(what, name, known)
    settings = _fitting(f"a {name}", entries, schema.of_settings(kind))
    for field, value in settings.items():
        if isinstance(value, dict):
            settings[field] = _revived(what, value, _SOLVERS, level + 1)
    return _called(kind, settings)


def _called(kind: Any, settings: dict[str, Any]) -> Any:
    try:
        return kind(**settings)
    except _REFUSALS as error:
        raise _UnfitError(f"settings that make a {kind.__name__}", f"others ({_first_line(error)})") from error


def _check_forms(cls: type[Pretrained], arguments: dict[str, Any], dtype: str, forms: Mapping[str, Form]) -> None:
    """Compare with the tensors of a model that has no memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever there is to say is said when the model itself is built
        like = _called(cls, copy.deepcopy(arguments)).to(getattr(torch, dtype))
    expected = {name: Form.of(tensor) for name, tensor in like.state_dict().items()}
    for name in sorted(expected.keys() | forms.keys()):
        if expected.get(name) != forms.get(name):
            form, found = expected.get(name, "no tensor"), forms.get(name, "none")
            raise _UnfitError(f"{form} for {quoted(name)} of this {cls.__name__}", f"{found}")


def _not_finite(tensor: Tensor) -> str | None:
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return None
    return f"{int((~torch.isfinite(tensor)).sum())} NaN or infinite of {tensor.numel()}"


def _first_line(error: Exception) -> str:
    return quoted((str(error).splitlines() or [type(error).__name__])[0].rstrip("."), 200)[1:-1]


def _name_of(cls: type, known: Mapping[str, Any]) -> str:
    """Of a class; one that is not the library's never goes by the name of one that is."""
    own = cls.__name__ in known and known[cls.__name__] is not cls
    return f"{cls.__module__}.{cls.__qualname__}" if own else cls.__name__


def _name_of_activation(model: Any) -> str | None:
    """None where it comes with f, so that it need not be given beside it."""
    name = model.activation.name
    if activations.BUILTIN.get(name) is model.activation:
        return name
    if name == model.f.__qualname__:
        return None
    return f"{name} of its own" if name in activations.BUILTIN else name


def _describe(settings: Any) -> dict[str, Any]:
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {"class": _name_of(type(settings), _SOLVERS | _ADJOINTS)} | {
        name: _describe(value) if dataclasses.is_dataclass(value) else value for name, value in fields.items()
    }


def _classes(module: Any, base: type) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and not inspect.isabstract(value)
    }


_GIVEN = "Check what was given beside the folder, or take another checkpoint."
_DAMAGED = "The folder is damaged or of another version: copy it again, or take another checkpoint."
_FUNCTIONS = _classes(function, ImplicitFunction)
_CONSTRAINTS = _classes(constraints, Constraint)
_SOLVERS, _ADJOINTS = _classes(solvers, Solver), _classes(adjoints, Adjoint)
# The arguments that JSON cannot hold, as it holds them.
_DESCRIBED: dict[str, Any] = {
    "f": lambda model: _name_of(model.f, _FUNCTIONS),
    "activation": _name_of_activation,
    "constraint": lambda model: {
        "name": _name_of(type(model.constraint), _CONSTRAINTS), "lipschitz": model.constraint.lipschitz,
        "weighted": getattr(model.constraint, "weights", None) is not None,
    },
    "solver": lambda model: _describe(model.solver),
    "adjoint": lambda model: _describe(model.adjoint),
}  # fmt: skip
