"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .._internal.errors import extra


def print_table(rows: Iterable[Iterable[str]], *columns: str, **style: Any) -> None:
    """Print rows under the names of their columns; `style` holds arguments of `rich.table.Table`."""
    table = extra("rich.table", "cli").Table(*columns, **style)
    for row in rows:
        table.add_row(*row)
    extra("rich.console", "cli").Console(highlight=False, soft_wrap=True).print(table)
