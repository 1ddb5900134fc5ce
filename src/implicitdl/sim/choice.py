"""Which of a teacher's activations become states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .._internal.errors import wrong
from .record import Call


def whole_modules(model: nn.Module, layers: Sequence[str | int] | None) -> set[str]:
    """Those of the chosen modules that are one activation from input to output: no parameters, no children."""
    modules = dict(model.named_modules())
    plain = {path for path, module in modules.items() if not [*module.parameters(), *module.children()]}
    return plain & set(layers or ())


def chosen(
    who: str, model: nn.Module, calls: list[Call], layers: Sequence[str | int] | None, skip_layers: int | None
) -> list[Call]:
    """The calls to take, in their order."""
    if not calls:
        raise wrong(
            who, "a teacher with activations", "none in its forward pass",
            "If its activation is one of your own, write it as a module and name that: layers=['act'].",
        )  # fmt: skip
    if skip_layers is not None:
        last = {id(call) for call in _last_of_blocks(model, "", calls, skip_layers)}
        return [call for call in calls if id(call) in last]
    if layers is None:
        return calls
    taken = set()
    for layer in layers:
        at = [i for i, call in enumerate(calls) if (i == layer if isinstance(layer, int) else _is_in(call, layer))]
        if not at:
            known = ", ".join(f"{i}: {call}" for i, call in enumerate(calls))
            raise wrong(who, f"layers among {known}", repr(layer), "Give names of modules, or numbers of calls.")
        taken |= set(at)
    return [calls[i] for i in sorted(taken)]


def _is_in(call: Call, path: str) -> bool:
    return call.module == path or call.module.startswith(path + ".") or path == ""


def _last_of_blocks(module: nn.Module, path: str, calls: list[Call], size: int) -> list[Call]:
    """All activations of a module of at most `size` children; of each child of a larger one, the last."""
    children = {f"{path}.{name}".lstrip("."): child for name, child in module.named_children()}
    of_child = {name: [call for call in calls if _is_in(call, name)] for name in children}
    inside = {id(call) for found in of_child.values() for call in found}
    own = [call for call in calls if id(call) not in inside]
    if len(children) > size:
        return own + [found[-1] for found in of_child.values() if found]
    return own + [
        call for name, child in children.items() for call in _last_of_blocks(child, name, of_child[name], size)
    ]
