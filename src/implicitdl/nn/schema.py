"""What a config.json may say: every class is described by the annotations that it has anyway, and msgspec checks it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from ..adjoints import Adjoint
from ..solvers import Solver

DTYPES = ("float64", "float32", "bfloat16", "float16")


def converted(entries: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, each of which has the type that `fields` gives its name; none is missing, and none is more.

    Raises:
        msgspec.ValidationError: what is wrong, and where.
    """
    kind = _struct(tuple(fields.items()))
    return msgspec.structs.asdict(msgspec.convert(entries, kind))


@functools.cache
def _struct(fields: tuple[tuple[str, Any], ...]) -> type[msgspec.Struct]:
    return msgspec.defstruct("Entries", [(name, _type(hint)) for name, hint in fields], forbid_unknown_fields=True)


def _type(hint: Any) -> Any:
    """An annotation as msgspec takes it: what has a schema of its own is an object."""
    if isinstance(hint, type) and issubclass(hint, (Solver, Adjoint)):
        return dict[str, Any]
    if type(None) in get_args(hint) and get_origin(hint) is not Literal:
        return Union[tuple(_type(part) for part in get_args(hint))]  # noqa: UP007
    return hint


def of_config(cls: Any) -> dict[str, Any]:
    """The whole file, for a model of this class."""
    objects = {"f": str, "activation": str | None, "constraint": dict[str, Any], "solver": Solver, "adjoint": Adjoint}
    taken = inspect.signature(cls).parameters
    return {"kind": str, "arguments": dict[str, Any]} | {name: objects[name] for name in objects if name in taken}


def of_arguments(cls: Any) -> dict[str, Any]:
    """What a model of this class is built with."""
    hints = get_type_hints(cls.__init__)
    return {name: hints.get(name, Any) for name in cls.saved_arguments} | {"dtype": Literal[DTYPES]}


def of_settings(cls: Any) -> dict[str, Any]:
    """The settings of a solver or an adjoint."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
