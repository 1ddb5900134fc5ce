"""The state of a run on disk: named tensors, and JSON for the rest of what an optimizer or a scheduler keeps."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._internal import store
from .._internal.errors import wrong
from .._internal.store import Form, quoted

T = TypeVar("T")

LAST, KIND = "last", "training"
# What JSON cannot say by itself is said by an object with one of these as its only key.
_TENSOR, _TUPLE, _FLOAT, _DICT, _COUNTER = _TAGS = ("$tensor", "$tuple", "$float", "$dict", "$counter")


class _Meta(msgspec.Struct, forbid_unknown_fields=True):
    """What is saved beside the tensors."""

    kind: str
    epoch: int
    seed: int
    classes: dict[str, str | None]
    groups: list[list[str]]
    states: dict[str, Any]
    extra: dict[str, Any]
    rows: list[Any]


@dataclass
class TrainState:
    """What a checkpoint of a run holds: the states of four objects, the seed, and the rows so far."""

    folder: Path
    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    scaler: Any
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def save(self) -> None:
        """Write ``last``: after this, a kill costs nothing that came before."""
        weights, extra = weights_of(self.model)
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        meta = _Meta(
            kind=KIND,
            epoch=len(self.rows),
            seed=self.seed,
            classes=self._classes(),
            groups=self._groups(),
            states={name: pack(part.state_dict(), name, tensors) for name, part in self._parts().items()},
            extra=extra,
            rows=pack(self.rows, "rows", tensors),
        )
        store.save(self.folder / LAST, tensors, msgspec.structs.asdict(meta))

    def restore(self, seed: int | None, epochs: int) -> None:
        """Take up what ``last`` holds, or change nothing and say why not.

        Arguments:
            seed: what the caller asked for; None takes the run's.
            epochs: how many the caller wants in all.
        """
        who = f"train(resume) of '{self.folder}'"
        with store.opened(self.folder / LAST, kind=KIND) as checkpoint:
            try:
                meta = msgspec.convert(checkpoint.meta, _Meta)
            except ValueError as error:
                do = "It is damaged, or of another version: take a copy of the run."
                raise checkpoint.wrong("the state of a run", f"another ({quoted(str(error), 200)})", do) from error
            self._check(who, of(checkpoint.forms, "model."), meta, seed, epochs)
            tensors = checkpoint.tensors()
        states = {name: unpacked(who, meta.states.get(name), tensors, name) for name in self._parts()}
        rows = unpacked(who, meta.rows, tensors, "rows")
        for name, part in self._parts().items():
            try:
                part.load_state_dict(states[name])
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                reason = quoted(str(error), 200)
                raise checkpoint.wrong(f"a state that this {name} takes", f"another ({reason})") from error
        set_weights(who, self.model, of(tensors, "model."), meta.extra)
        self.seed, self.rows = meta.seed, rows

    def _check(self, who: str, weights: dict[str, Form], meta: _Meta, seed: int | None, epochs: int) -> None:
        do = "Resume with what the run was started with, or start another run in another dirname."
        own = self._classes()
        for part, saved in meta.classes.items():
            if own.get(part) != saved:
                raise wrong(who, f"{part} {saved}", own.get(part), do)
        check_weights(who, self.model, weights)
        if self._groups() != meta.groups:
            mine, theirs = (" | ".join(map(" ".join, groups)) for groups in (self._groups(), meta.groups))
            raise wrong(who, f"an optimizer over {theirs}", mine, do)
        if seed is not None and seed != meta.seed:
            raise wrong(who, f"seed={meta.seed}", seed, "Leave the seed out, or start another run.")
        if epochs < meta.epoch:
            done = f"epochs ≥ {meta.epoch}, which are done"
            raise wrong(who, done, epochs, "Its weights are in 'last' and 'best'.")

    def _parts(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def _classes(self) -> dict[str, str | None]:
        names = ("model", "optimizer", "scheduler", "scaler")
        parts = {name: getattr(self, name) for name in names}
        return {name: None if part is None else type(part).__qualname__ for name, part in parts.items()}

    def _groups(self) -> list[list[str]]:
        """The names of the parameters in each group: an optimizer's state knows them by position only."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of `value`; its tensors go into `tensors` under their path, named in the JSON.

    Arguments:
        value: a tensor, number, text, None, or a list, tuple, dict or Counter of such, nested.
        path: the name of `value`, such as "optimizer"; its tensors are named "optimizer.state.0.exp_avg" and so on.
        tensors: filled.

    Returns:
        The JSON value, from which `unpack` makes an equal one.

    Raises:
        ArgumentError: something in it is of another kind (a function, an object), which only a pickle could keep.

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
        plain = all(isinstance(key, str) and key not in _TAGS for key in value)
        return dict(items) if plain else {_DICT: items}
    expected = f"tensors, numbers, text, lists and dicts in the state of {path}"
    do = "Only a pickle could keep it, and pickles are not used: drop it from the state_dict."
    raise wrong("train", expected, f"a {type(value).__name__}", do)


def unpacked(who: str, packed: Any, tensors: Mapping[str, Tensor], what: str) -> Any:
    """`unpack` of what a file holds, which may be damaged."""
    try:
        return unpack(packed, tensors)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        do = "The checkpoint is damaged: copy it again, or take another one."
        raise wrong(who, f"the state of {what} as it is saved", f"another ({quoted(str(error))})", do) from error


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
