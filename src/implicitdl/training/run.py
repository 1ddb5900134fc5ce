"""The state of a run on disk: everything that decides how it goes on, and the checks before it does."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from torch import nn
from torch.optim import Optimizer

from .._internal import store
from .._internal.errors import wrong
from .logger import LAST, Row, refuse_run
from .state import check_weights, of, pack, set_weights, unpacked, weights_of

KIND = "training"


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
class Run:
    """What a checkpoint of a run holds: the four objects' states, the seed and the rows so far."""

    folder: Path
    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    scaler: Any
    seed: int
    rows: list[Row] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Epochs done."""
        return len(self.rows)

    def save(self) -> None:
        """Write ``last``: after this, a kill costs nothing that came before."""
        tensors, rest = weights_of(self.model)
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        meta = {
            "kind": KIND,
            "epoch": self.done,
            "seed": self.seed,
            "classes": self._classes(),
            "groups": self._groups(),
            "states": {name: pack(part.state_dict(), name, tensors) for name, part in self._parts().items()},
            "extra": rest,
            "rows": pack(self.rows, "rows", tensors),
        }
        store.save(self.folder / LAST, tensors, meta)

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
                raise checkpoint.wrong(
                    "the state of a run", f"another ({store.quoted(str(error), 200)})", do
                ) from error
            self._check(who, of(checkpoint.forms, "model."), meta, seed, epochs)
            tensors = checkpoint.tensors()
        states = {name: unpacked(who, meta.states.get(name), tensors, name) for name in self._parts()}
        rows = unpacked(who, meta.rows, tensors, "rows")
        for name, part in self._parts().items():
            try:
                part.load_state_dict(states[name])
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                reason = store.quoted(str(error), 200)
                raise checkpoint.wrong(f"a state that this {name} takes", f"another ({reason})") from error
        set_weights(who, self.model, of(tensors, "model."), meta.extra)
        self.seed, self.rows = meta.seed, rows

    def _check(self, who: str, weights: dict[str, store.Form], meta: _Meta, seed: int | None, epochs: int) -> None:
        do = "Resume with what the run was started with, or start another run in another dirname."
        own = self._classes()
        for part, saved in meta.classes.items():
            if own.get(part) != saved:
                raise wrong(who, f"{part} {saved}", str(own.get(part)), do)
        check_weights(who, self.model, weights)
        if self._groups() != meta.groups:
            mine, theirs = (" | ".join(map(" ".join, groups)) for groups in (self._groups(), meta.groups))
            raise wrong(who, f"an optimizer over {theirs}", mine, do)
        if seed is not None and seed != meta.seed:
            raise wrong(who, f"seed={meta.seed}", str(seed), "Leave the seed out, or start another run.")
        if epochs < meta.epoch:
            raise wrong(
                who,
                f"epochs ≥ {meta.epoch}, which are done",
                str(epochs),
                "Its weights are in 'last' and 'best'.",
            )

    def _parts(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def _classes(self) -> dict[str, str | None]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }
        return {name: None if part is None else type(part).__qualname__ for name, part in parts.items()}

    def _groups(self) -> list[list[str]]:
        """The names of the parameters in each group: an optimiser's state knows them by position only."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]


def run_folder(dirname: str | os.PathLike[str]) -> Path:
    """The folder of a run."""
    if not isinstance(dirname, (str, os.PathLike)) or not os.fspath(dirname):
        raise wrong("train", "dirname to be a path", repr(dirname), "Name the folder of this run.")
    return Path(dirname)


def has_checkpoint(folder: Path, resume: bool) -> bool:
    """Whether there is one to go on from; raises where one would be lost."""
    if not resume:
        refuse_run("train", folder, "Pass resume=True to go on with it, or another dirname.")
        return False
    if store.exists(folder / LAST):
        return True
    # The first thing a run writes is `last`: figures or a `best` without it belong to something else.
    refuse_run("train", folder, f"It has no '{LAST}' to resume: give another dirname.")
    return False


def check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """A parameter outside the model would be trained and then lost: checkpoints hold the model's."""
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strange = sum(id(parameter) not in own for parameter in held)
    if strange:
        raise wrong(
            "train",
            "an optimizer over the model's parameters",
            f"{strange} of {len(held)} that the model does not have",
            "Build it with model.parameters(); a loss with weights goes into the model.",
        )
