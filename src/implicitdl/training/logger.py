"""The record of a run: its figures as CSV, JSON lines, curves of TensorBoard and lines on the console; its weights."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from .._internal import store
from .._internal.errors import extra, wrong
from ..nn.pretrained import NotRebuiltError
from .state import KIND, LAST, check_weights, of, set_weights, weights_of

CSV, JSONL, BEST = "metrics.csv", "metrics.jsonl", "best"
# The figures of the bar and of an epoch's line.
_WORDS = {
    "loss": "loss {:.4f}",
    "acc": "acc {:.2%}",
    "valid_loss": "valid loss {:.4f}",
    "valid_acc": "valid acc {:.2%}",
    "forward_steps": "forward {:.1f}",
    "backward_steps": "backward {:.1f}",
    "missed": "missed {:.2%}",
}

Figure = bool | int | float | str | None
Row = dict[str, Figure]


class Logger:
    """Prints rows of figures, writes them to metrics.csv and metrics.jsonl, and keeps the best weights.

    Arguments:
        printstr: a format string and the names of the figures that fill it; None prints nothing.
        dir_name: the run's folder, made if missing; None writes nothing. It must not hold another run.
        rows: the rows of a run that is continued: the two files are rewritten from them.

    Attributes:
        rows: list of dicts, oldest first.
        best: the row with the best figure so far, None before there is one.

    Raises:
        ArgumentError: the folder already holds a run (nothing is overwritten).
        CheckpointError: the folder cannot be written.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> logger = Logger(printstr=["batch {}: {:.2f}", "batch", "valid_acc"], dir_name=folder)
        >>> model = torch.nn.Linear(2, 1)
        >>> logger.log({"batch": 0, "valid_acc": torch.tensor(0.5)}, model, "valid_acc")
        batch 0: 0.50
        >>> logger.best
        {'batch': 0, 'valid_acc': 0.5}
        >>> load_weights(model, folder + "/best")
    """

    def __init__(
        self,
        printstr: Sequence[str] | None = None,
        dir_name: str | os.PathLike[str] | None = None,
        *,
        rows: Iterable[Row] | None = None,
    ) -> None:
        if printstr is not None and (isinstance(printstr, str) or not printstr):
            raise wrong("Logger", "printstr=[format, name, name, …]", repr(printstr), "Or leave it out.")
        self.printstr = printstr
        self.folder = None if dir_name is None else Path(dir_name)
        self.rows: list[Row] = list(rows or ())
        self.best: Row | None = None
        if self.folder is not None:
            if rows is None:
                refuse_run("Logger", self.folder, "Choose another dir_name, or move that run away.")
            write_rows(self.folder, self.rows)

    def log(
        self,
        values: Mapping[str, Any],
        model: nn.Module | None = None,
        metric: str | None = None,
        *,
        lower: bool | None = None,
    ) -> None:
        """Append one row, and save the model to ``dir_name/best`` when its `metric` is the best so far.

        Arguments:
            values: numbers by name; a tensor of one element is read. Every row has the first one's names.
            model: whose weights are kept; None keeps none.
            metric: the name in `values` that decides; NaN and None never win, the first of equals stays.
            lower: whether a smaller figure is better; by default where "loss" is part of the name.

        Raises:
            ArgumentError: a value is no number, a name is missing, or the names changed.
            CheckpointError: the folder cannot be written.
        """
        row = {name: _plain(name, value) for name, value in values.items()}
        if self.rows and row.keys() != self.rows[0].keys():
            names = ", ".join(self.rows[0])
            raise wrong("Logger", f"the first row's names ({names})", ", ".join(row), "Give None for what is missing.")
        row = {name: row[name] for name in self.rows[0]} if self.rows else row  # the order of the columns
        line = self._line(row)
        better = metric is not None and self.judge(row, metric, lower)
        if better and model is not None and self.folder is not None:
            save_weights(model, self.folder / BEST, row)
        self.rows.append(row)
        if self.folder is not None:
            for name, text in _texts([row], head=len(self.rows) == 1).items():
                store.append_to(self.folder / name, text.encode())
        if line is not None:
            print(line)

    def judge(self, row: Row, metric: str, lower: bool | None = None) -> bool:
        """Whether a row is better than all before it by `metric`, at a tie by its validation loss; it is then `best`.

        On a small validation set accuracies tie often, and the first of them is an early, half-trained one.
        """
        value = _entry(row, metric)
        if not isinstance(value, (int, float)) or math.isnan(value):
            return False
        held = (self.best or {}).get(metric)
        if isinstance(held, (int, float)):
            loss, held_loss = row.get("valid_loss"), (self.best or {}).get("valid_loss")
            if value == held:
                if not (isinstance(loss, (int, float)) and isinstance(held_loss, (int, float)) and loss < held_loss):
                    return False
            elif (value < held) != ("loss" in metric if lower is None else lower):
                return False
        self.best = row
        return True

    def _line(self, row: Row) -> str | None:
        if self.printstr is None:
            return None
        values = [_entry(row, name) for name in self.printstr[1:]]
        try:
            return self.printstr[0].format(*values)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            expected, do = "a format string for " + ", ".join(self.printstr[1:]), f"Python's format says: {error}."
            raise wrong("Logger", expected, self.printstr[0], do) from error


def refuse_run(who: str, folder: Path, do: str) -> None:
    """Raise when a folder holds a run: nothing is ever overwritten."""
    held = [name for name in (BEST, LAST) if store.exists(folder / name)]
    held += [name for name in (CSV, JSONL) if os.path.isfile(folder / name) and os.path.getsize(folder / name)]
    if held:
        raise wrong(who, f"a folder without a run in '{folder}'", f"one with {held[0]}", do)


def save_weights(model: nn.Module, folder: Path, row: Row) -> None:
    """Write a model's weights: by its own ``save_pretrained`` where it has one, else tensors by name.

    So are those of a model that its class does not make again, such as a pruned one: `load_weights` reads both.
    """
    own = getattr(model, "save_pretrained", None)
    if callable(own):
        try:
            return own(folder)
        except NotRebuiltError:
            pass
    tensors, rest = weights_of(model)
    meta = {"kind": "weights", "model": type(model).__qualname__, "extra": rest, "row": _strict(row)}
    store.save(folder, tensors, meta)


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load the weights in ``dirname/best`` or ``dirname/last`` of a run into a model built as that one was.

    Arguments:
        model: changed in place.
        folder: a checkpoint folder of `train`, `Logger`, or a model's own ``save_pretrained``.

    Raises:
        CheckpointError: no whole checkpoint there.
        ArgumentError: the checkpoint of another model.
    """
    with store.opened(folder) as checkpoint:
        prefix = "model." if checkpoint.meta.get("kind") == KIND else ""
        check_weights("load_weights", model, of(checkpoint.forms, prefix))
        tensors, extra = of(checkpoint.tensors(), prefix), checkpoint.meta.get("extra", {})
    set_weights("load_weights", model, tensors, extra)


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Rewrite both files, each atomically."""
    for name, text in _texts(rows).items():
        store.write_file(folder / name, text.encode())


def _texts(rows: Sequence[Row], head: bool = True) -> dict[str, str]:
    """The rows as CSV, with the names of the columns before them, and as JSON lines."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    if rows and head:
        writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)  # None is an empty cell
    return {CSV: table.getvalue(), JSONL: "".join(json.dumps(_strict(row), allow_nan=False) + "\n" for row in rows)}


def _strict(row: Row) -> Row:
    # JSON has no NaN and no infinity.
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}


def _entry(row: Row, name: str) -> Figure:
    if name not in row:
        raise wrong("Logger", f"'{name}' among the values", ", ".join(row) or "none", "Add it, or name another.")
    return row[name]


def _plain(name: str, value: Any) -> Figure:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().item()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise wrong("Logger", f"'{name}' to be one number", got, "Reduce it first.")


def in_words(row: Row) -> str:
    """The figures that are there, in one line."""
    return "  ".join(form.format(row[name]) for name, form in _WORDS.items() if row.get(name) is not None)


def progress_bar(shown: bool) -> contextlib.AbstractContextManager[Any]:
    """rich's bar of the running epoch; where there is no terminal, it only prints the line of a finished one."""
    if not shown:
        return contextlib.nullcontext()
    rich = extra("rich.progress", "train")
    console = extra("rich.console", "train").Console(highlight=False, soft_wrap=True)
    # No thread of its own: it would run beside autograd's and redraw figures that have not changed.
    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=20),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[figures]}"),
        rich.TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )


def tensorboard(folder: Path | None, done: int) -> contextlib.AbstractContextManager[Any]:
    """TensorBoard's writer, where it is installed. Curves of epochs that a killed run began and this one does again
    are dropped.
    """
    if folder is None or importlib.util.find_spec("tensorboard") is None:
        return contextlib.nullcontext()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own imports deprecate is not our user's business
        writer = extra("torch.utils.tensorboard", "train").SummaryWriter
    return contextlib.closing(writer(str(folder / "tensorboard"), purge_step=done + 1))
