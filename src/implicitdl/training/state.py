"""State dictionaries as named tensors plus JSON: what an optimiser, a scheduler or a module keeps."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import wrong

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


def check_weights(who: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Say in one line what keeps `tensors` from being the weights of `model`; load nothing."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    do = "Build the model that was saved, or take the checkpoint of this one."
    for name in own:
        if name not in tensors:
            raise wrong(who, f"a checkpoint with the model's '{name}'", "one without it", do)
    for name in tensors:
        # What an extra state holds is not a weight: load_state_dict hands it to the module that saved it.
        if name not in own and "_extra_state" not in name:
            raise wrong(who, f"a model with the checkpoint's '{name}'", "one without it", do)
    for name, like in own.items():
        saved = tensors[name]
        if saved.shape != like.shape or saved.dtype != like.dtype:
            raise wrong(who, f"'{name}' {_form(like)} as in the model", _form(saved), do)


def set_weights(model: nn.Module, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Load what `weights_of` gave, after `check_weights`."""
    own = model.state_dict().keys() - extra.keys()
    state: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name in own}
    state.update({name: unpack(packed, tensors) for name, packed in extra.items()})
    with torch.no_grad():
        model.load_state_dict(state)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
