"""State dictionaries as named tensors plus JSON: what an optimiser, a scheduler or a module keeps."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .._internal.errors import wrong
from .._internal.store import Form, quoted

T = TypeVar("T")

# What JSON cannot say by itself is said by an object with one of these as its only key.
_TENSOR, _TUPLE, _FLOAT, _DICT, _COUNTER = "$tensor", "$tuple", "$float", "$dict", "$counter"
_TAGS = {_TENSOR, _TUPLE, _FLOAT, _DICT, _COUNTER}


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of `value`; its tensors go into `tensors` under their path, named in the JSON.

    Arguments:
        value: a tensor, number, text, None, or a list, tuple, dict or Counter of such, nested.
        path: the name of `value`, such as "optimizer"; its tensors are named "optimizer.state.0.exp_avg" and
            so on.
        tensors: filled.

    Returns:
        The JSON value, from which `unpack` makes an equal one.

    Raises:
        ArgumentError: something in it is of another kind (a function, an object), which only a pickle could
            keep.

    Example:
        >>> tensors = {}
        >>> packed = pack({0: {"step": torch.tensor(3.0)}, "betas": (0.9, 0.999)}, "optimizer", tensors)
        >>> list(tensors)
        ['optimizer.0.step']
        >>> unpack(packed, tensors)
        {0: {'step': tensor(3.)}, 'betas': (0.9, 0.999)}
    """
    if isinstance(value, Tensor):
        while path in tensors:  # The path of {"a.b": …} and of {"a": {"b": …}} is the same.
            path += "'"
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(value)}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if type(value) in (list, tuple):
        items = [pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if type(value) in (dict, OrderedDict, Counter):
        items = [[pack(k, path, {}), pack(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        if isinstance(value, Counter):
            return {_COUNTER: items}
        plain = all(isinstance(key, str) for key in value) and not _TAGS & value.keys()
        return dict(items) if plain else {_DICT: items}
    raise wrong(
        "train",
        f"tensors, numbers, text, lists and dicts in the state of {path}",
        f"a {type(value).__name__}",
        "Only a pickle could keep it, and pickles are not used: drop it from the state_dict.",
    )


def unpacked(who: str, packed: Any, tensors: Mapping[str, Tensor], what: str) -> Any:
    """The same as `unpack`, for what comes from a file."""
    try:
        return unpack(packed, tensors)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = quoted(str(error))
        do = "The checkpoint is damaged: copy it again, or take another one."
        raise wrong(who, f"the state of {what} as it is saved", f"another ({reason})", do) from error


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `pack` was given, from its JSON and the tensors it named."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if _TENSOR in packed:
        return tensors[packed[_TENSOR]]
    if _FLOAT in packed:
        return float(packed[_FLOAT])
    if _TUPLE in packed:
        return tuple(unpack(packed[_TUPLE], tensors))
    for tag, kind in ((_DICT, dict), (_COUNTER, Counter)):
        if tag in packed:
            # Keys were packed too: a float key may be infinite, a tuple is a list in JSON.
            return kind({unpack(key, tensors): unpack(value, tensors) for key, value in packed[tag]})
    return {key: unpack(value, tensors) for key, value in packed.items()}


def weights_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a module's state_dict, and the packed rest (a module's extra state)."""
    state = model.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    extra: dict[str, Any] = {}
    for name in state.keys() - tensors.keys():
        extra[name] = pack(state[name], name, tensors)
    return tensors, extra


def of(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What has the prefix, by the rest of its name."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def check_weights(who: str, model: nn.Module, saved: Mapping[str, Form]) -> None:
    """Say in one line what keeps tensors of these forms from being the weights of `model`; load nothing."""
    own = {name: Form.of(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    do = "Build the model that was saved, or take the checkpoint of this one."
    for name in own:
        if name not in saved:
            raise wrong(who, f"a checkpoint with the model's '{name}'", "one without it", do)
    for name in saved:
        # What an extra state holds is not a weight: load_state_dict hands it to the module that saved it.
        if name not in own and "_extra_state" not in name:
            raise wrong(who, f"a model with the checkpoint's '{name}'", "one without it", do)
    for name, form in own.items():
        if saved[name] != form:
            raise wrong(who, f"'{name}' {form} as in the model", f"{saved[name]}", do)


def set_weights(who: str, model: nn.Module, tensors: Mapping[str, Tensor], extra: Any) -> None:
    """Load what `weights_of` gave, after `check_weights`."""
    state: dict[str, Any] = {}
    if extra != {}:
        own = {name for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
        if not isinstance(extra, dict) or extra.keys() != own:
            raise wrong(who, f"the extra state of {sorted(own)}", quoted(extra), "Build the model that was saved.")
        state |= {name: unpacked(who, packed, tensors, name) for name, packed in extra.items()}
    own = model.state_dict().keys() - state.keys()
    state |= {name: tensor for name, tensor in tensors.items() if name in own}
    with torch.no_grad():
        model.load_state_dict(state)
