"""What is shown while a run goes on: a bar and a line per epoch on the console, curves in TensorBoard."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .._internal.errors import extra
from .logger import Row

# A few times a second is what an eye follows; every refresh waits for the device.
_SECONDS = 0.25


class Clock:
    """Says when it is time to look at the figures again."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _SECONDS

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _SECONDS
        return True


class Bar:
    """A rich bar of the running epoch; where there is no terminal, only one line per finished epoch."""

    def __init__(self, epochs: int, shown: bool) -> None:
        self._epochs = epochs
        self._progress: Any = None
        if shown:
            rich = extra("rich.progress", "train")
            columns = (
                rich.TextColumn("{task.description}"),
                rich.BarColumn(bar_width=20),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[figures]}"),
                rich.TimeRemainingColumn(),
            )
            console = extra("rich.console", "train").Console(highlight=False, soft_wrap=True)
            # No thread of its own: it would run beside autograd's and redraw figures that have not changed.
            self._progress = rich.Progress(
                *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
            )

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, epoch: int, batches: int | None) -> None:
        if self._progress is not None:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(f"epoch {epoch}/{self._epochs}", total=batches, figures="")

    def show(self, batches: int, row: Mapping[str, Any]) -> None:
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=batches, figures=_words(row), refresh=True)

    def end(self, row: Row) -> None:
        if self._progress is not None:
            self._progress.console.print(f"epoch {row['epoch']}/{self._epochs}  {_words(row)}")


def _words(row: Mapping[str, Any]) -> str:
    """The figures that are there, in one line."""
    forms = {
        "loss": "loss {:.4f}",
        "acc": "acc {:.2%}",
        "valid_loss": "valid loss {:.4f}",
        "valid_acc": "valid acc {:.2%}",
        "forward_steps": "forward {:.1f}",
        "backward_steps": "backward {:.1f}",
        "missed": "missed {:.2%}",
    }
    return "  ".join(form.format(row[name]) for name, form in forms.items() if row.get(name) is not None)


class Board:
    """TensorBoard's curves of the rows, where it is installed."""

    def __init__(self, folder: Path | None, done: int) -> None:
        self._writer: Any = None
        if folder is not None and importlib.util.find_spec("tensorboard") is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what its own imports deprecate is not our user's business
                writer = extra("torch.utils.tensorboard", "train").SummaryWriter
            # Curves of epochs that a killed run began and this one does again are dropped.
            self._writer = writer(str(folder / "tensorboard"), purge_step=done + 1)

    def __enter__(self) -> Board:
        return self

    def add(self, row: Row) -> None:
        if self._writer is not None:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
