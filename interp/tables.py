"""Tables of text: ruled on a terminal, tab-separated lines in a pipe or a file."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    title: str | None = None,
    console: Console | None = None,
) -> None:
    """Print a table.

    Args:
        columns: a name for each column.
        rows: what stands in them. Floats are written with two digits, None as nothing.
        title: a line above; left out in a pipe, where every line is a row.
        console: where to print; standard output without it.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """
    console = Console() if console is None else console
    words = [[_word(cell) for cell in row] for row in rows]
    for row in words:
        if len(row) != len(columns):
            raise ValueError(f"A row of {len(row)} cells does not fit {len(columns)} columns: {row}.")
    if not console.is_terminal and not console.is_jupyter:
        for row in [list(columns), *words]:
            console.file.write("\t".join(row) + "\n")
        return
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in words:
        # Text, so that brackets in names are not taken for markup.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _word(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
