"""A bar over the rows that a solver has done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .._internal.errors import extra


@contextlib.contextmanager
def row_bar(shown: bool, title: str = "rows") -> Iterator[Callable[[int, int], None] | None]:
    """A function of (rows done, all rows) that moves a bar on the terminal; None where none is to be shown."""
    if not shown:
        yield None
        return
    rich = extra("rich.progress", "train")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=20),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    )
    # No thread of its own: it would run beside the solver's.
    with rich.Progress(*columns, auto_refresh=False, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total, refresh=True)
