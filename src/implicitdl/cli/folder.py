"""What the command line keeps in a run's folder beside the checkpoints: run.json, how the run was made."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import _store
from .._checks import ArgumentError, wrong
from ..nn import pretrained
from ..training.logger import BEST, JSONL, LAST, refuse_run
from .models import CLASSES, Model
from .options import WHO, Options, flag

FILE = "run.json"
# What may differ when a run goes on: it decides where, and not what, is computed.
_FREE = {"root"}


def new(options: Options, out: str | None) -> Path:
    """The folder of a new run, not made yet; raises where one already is."""
    if out is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise wrong(WHO, "--out when several processes train", "none", "Name the folder of this run.")
        kind = f"n{options.hidden_dim}" if options.model == "implicit" else options.model
        name = f"runs/{options.data}-{kind}"
        return next(path for i in itertools.count(1) if not (path := Path(f"{name}-{i}")).exists())
    folder = Path(out)
    refuse_run(WHO, folder, "Pass --resume to go on with it, or another --out.")
    return folder


def resumed(given: Mapping[str, Any], options: Options, out: str | None) -> tuple[Path, Options]:
    """The folder of a run that goes on, and its options; those given again must be the same.

    Where nothing was saved yet the run starts, so that one command line serves first and later starts.
    """
    if out is None:
        raise wrong(WHO, "--out with --resume", "none", "Name the folder of the run.")
    folder = Path(out)
    if not _store.exists(folder / LAST):
        return new(options, out), options
    saved = read(WHO, folder)
    free = _FREE if saved.schedule == "cosine" else _FREE | {"epochs"}
    for name, value in given.items():
        before = getattr(saved, name)
        if value != before and name not in free:
            do = "Leave it out, or start another run with another --out."
            raise wrong(f"{WHO} --resume of '{folder}'", f"{flag(name)} as it was ({before})", value, do)
    changed = {name: value for name, value in given.items() if name in free}
    return folder, dataclasses.replace(saved, **changed)


@contextlib.contextmanager
def claimed(folder: Path, options: Options, model: Model) -> Iterator[None]:
    """Write run.json; take it back when training is refused, or fails before it has saved anything."""
    before = (folder / FILE).read_bytes() if (folder / FILE).is_file() else None
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    text = {
        "implicitdl": version("implicitdl"),
        "options": dataclasses.asdict(options),
        "model": pretrained.config(model),
    }
    try:
        _store.write_file(folder / FILE, (json.dumps(text, indent=1) + "\n").encode())
        yield
    except BaseException as error:
        if before is not None and isinstance(error, ArgumentError):
            _store.write_file(folder / FILE, before)
        elif not _store.exists(folder / LAST):
            with contextlib.suppress(OSError):  # not made in the first place, or something else is in it
                (folder / FILE).unlink(missing_ok=True)
                for path in absent:
                    path.rmdir()
        raise


def read(who: str, folder: Path) -> Options:
    """The options of a run."""
    path = folder / FILE
    if not path.is_file():
        _refuse(who, folder)
    do = "The file is damaged, or of another version: take it from a copy of the run."
    try:
        options = json.loads(path.read_text(encoding="utf-8"))["options"]
        return Options(**options).check()
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise wrong(who, f"a whole {FILE} in '{folder}'", f"one that cannot be read ({reason})", do) from error


def best(who: str, folder: Path, options: Options) -> Model:
    """The best checkpoint of a run with these options."""
    if not _store.exists(folder / BEST) and _store.exists(folder / LAST):
        raise wrong(who, f"a finished epoch in '{folder}'", "none yet", "Go on with it: implicitdl train --resume.")
    return CLASSES[options.model].from_pretrained(folder / BEST)


def rows(who: str, folder: Path) -> list[dict[str, Any]]:
    """The figures of every epoch."""
    try:
        return [json.loads(line) for line in (folder / JSONL).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise wrong(
            who, f"a whole {JSONL} in '{folder}'", f"{error}", "Go on with the run: that rewrites it."
        ) from error


def _refuse(who: str, folder: Path) -> None:
    expected, do = f"a run's folder, with {FILE}", "Give a folder that `implicitdl train` wrote."
    if not folder.exists():
        raise wrong(who, expected, f"nothing at '{folder}'", do)
    if folder.is_file():
        _store.load(folder)  # words it: a pickle, or some other file
    raise wrong(who, expected, f"none in '{folder}'", do)
