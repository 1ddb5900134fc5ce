"""What the command line keeps in a run's folder beside its models: how the run was made.

`train` leaves run.json, the figures of every epoch and the checkpoints; `sim` leaves sim.json, which has its figures
too, and one model.  Whoever reads a run is told of both alike: the options that its model and its data depend on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

import msgspec

from .._internal import store
from .._internal.errors import ArgumentError, wrong
from ..nn import ImplicitModel, schema
from ..training.logger import BEST, JSONL, LAST, refuse_run
from .build import CLASSES, Model
from .options import Options, flag

T = TypeVar("T")

FILE = "run.json"
SIM, MODEL = "sim.json", "model"
# Of the options of `sim`, those that `train` has too.
_SHARED = ("data", "root", "holdout", "split_seed", "kappa", "activation")
# What may differ when a run goes on: it decides where, and not what, is computed.
_FREE = {"root"}


def new(options: Options, out: str | None) -> Path:
    """The folder of a new run, not made yet; raises where one already is."""
    if out is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise wrong(Options.WHO, "--out when several processes train", "none", "Name the folder of this run.")
        kind = f"n{options.hidden_dim}" if options.model == "implicit" else options.model
        name = f"runs/{options.data}-{kind}"
        return next(path for i in itertools.count(1) if not os.path.lexists(path := Path(f"{name}-{i}")))
    folder = Path(out)
    if is_main_process():
        store.refuse_owned(folder)  # before what it holds: the run that writes it may have just begun
    if is_sim(folder):
        raise wrong(Options.WHO, f"a folder without a run in '{folder}'", f"one with {SIM}", "Name another --out.")
    refuse_run(Options.WHO, folder, "Pass --resume to go on with it, or another --out.")
    return folder


def is_main_process() -> bool:
    """Whether this is the process that prints and writes, of those that torchrun launched."""
    return int(os.environ.get("RANK", "0")) == 0


def is_sim(folder: Path) -> bool:
    """Whether `sim` wrote it."""
    return os.path.isfile(folder / SIM)


def is_run(folder: Path) -> bool:
    return os.path.isfile(folder / FILE) or is_sim(folder)


def resumed(given: Mapping[str, Any], options: Options, out: str | None) -> tuple[Path, Options]:
    """The folder of a run that goes on, and its options; those given again must be the same.

    Where nothing was saved yet the run starts, so that one command line serves first and later starts.
    """
    if out is None:
        raise wrong(Options.WHO, "--out with --resume", "none", "Name the folder of the run.")
    folder = Path(out)
    if not store.exists(folder / LAST):
        return new(options, out), options
    if is_main_process():
        store.refuse_owned(folder)
    saved = read(Options.WHO, folder)
    free = _FREE if saved.schedule == "cosine" else _FREE | {"epochs"}
    for name, value in given.items():
        before = getattr(saved, name)
        if value != before and name not in free:
            do = "Leave it out, or start another run with another --out."
            raise wrong(f"{Options.WHO} --resume of '{folder}'", f"{flag(name)} as it was ({before})", value, do)
    changed = {name: value for name, value in given.items() if name in free}
    return folder, dataclasses.replace(saved, **changed)


@contextlib.contextmanager
def claim(folder: Path, name: str, options: Any, saved: str, **more: Any) -> Iterator[None]:
    """Own a run's folder and write how the run is made; take it back where nothing comes of it.

    Arguments:
        folder: of the run; made where it is not there, so that one that cannot be written is found out now.
        name: of the file.
        options: a dataclass.
        saved: name of the folder of the first model.
        more: what else to write.
    """
    with store.owned(folder):  # which takes back the folder, where nothing stays in it
        before = (folder / name).read_bytes() if os.path.isfile(folder / name) else None
        try:
            write(folder / name, options, **more)
            yield
        except BaseException as error:
            if before is not None and isinstance(error, ArgumentError):
                store.write_file(folder / name, before)
            elif not store.exists(folder / saved):
                with contextlib.suppress(OSError):  # not made in the first place
                    (folder / name).unlink(missing_ok=True)
            raise


def write(path: Path, options: Any, /, **more: Any) -> None:
    """How a run was made, and what else there is to say, as JSON."""
    content = {"implicitdl": version("implicitdl"), "options": dataclasses.asdict(options), **more}
    store.write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def read(who: str, folder: Path) -> Options:
    """The options of a run; of one of `sim`, those that `train` shares."""
    if not is_run(folder):
        if os.path.isfile(folder):
            store.load(folder)  # words it: a pickle, or some other file
        got = f"none in '{folder}'" if os.path.exists(folder) else f"nothing at '{folder}'"
        do = "Give a folder that `implicitdl train` or `implicitdl sim` wrote."
        raise wrong(who, f"a run's folder, with {FILE}", got, do)
    if is_sim(folder):
        return _understood(who, folder, SIM, lambda content: _of_sim(content["options"]))
    return _understood(who, folder, FILE, lambda content: _options(content["options"]))


def matched(who: str, folder: Path) -> dict[str, str]:
    """What `sim` found, by name and in words."""
    return _understood(who, folder, SIM, lambda content: msgspec.convert(content["facts"], dict[str, str]))


def _of_sim(options: dict[str, Any]) -> Options:
    return _options({name: options[name] for name in _SHARED})


def _options(saved: dict[str, Any]) -> Options:
    """Those that an earlier version did not have yet are as they are by default."""
    entries = dataclasses.asdict(Options()) | saved
    return Options(**schema.converted(entries, schema.of_settings(Options))).check()


def _understood(who: str, folder: Path, name: str, use: Callable[[dict[str, Any]], T]) -> T:
    do = "The file is damaged, or of another version: take it from a copy of the run."
    try:
        return use(store.parse(store.read(folder / name)))
    except store.CheckpointError:
        raise  # not readable at all, which is worded
    except (ValueError, TypeError, KeyError) as error:
        reason = store.quoted(str(error).partition("\n")[0].rstrip("."), 200)[1:-1]
        raise wrong(who, f"a whole {name} in '{folder}'", f"one that cannot be read ({reason})", do) from error


def best(who: str, folder: Path, options: Options) -> Model:
    """The best checkpoint of a run with these options."""
    if is_sim(folder):
        return ImplicitModel.from_pretrained(folder / MODEL)
    if not store.exists(folder / BEST) and store.exists(folder / LAST):
        raise wrong(who, f"a finished epoch in '{folder}'", "none yet", "Go on with it: implicitdl train --resume.")
    return CLASSES[options.model].from_pretrained(folder / BEST)


class _Row(TypedDict):
    """The figures of an epoch; None stands where there was nothing to measure."""

    epoch: int
    loss: float | None
    acc: float | None
    valid_loss: float | None
    valid_acc: float
    forward_steps: float | None
    backward_steps: float | None
    missed: float | None
    valid_steps: float | None
    valid_missed: float | None
    lr: float


def rows(who: str, folder: Path) -> list[dict[str, Any]]:
    """The figures of every epoch."""
    try:
        found = [store.parse(line) for line in store.read(folder / JSONL).splitlines()]
        msgspec.convert(found, Annotated[list[_Row], msgspec.Meta(min_length=1)])
        return found
    except ValueError as error:
        reason = store.quoted(str(error), 200)[1:-1]
        do = "Go on with the run: that rewrites it."
        raise wrong(who, f"a whole {JSONL} in '{folder}'", f"one that cannot be read ({reason})", do) from error
