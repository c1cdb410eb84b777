"""Where callbacks print: a terminal that can be redrawn, or a file in which every line stays."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def is_terminal() -> bool:
    """Return whether output can be redrawn in place, asked of the stream itself.

    `FORCE_COLOR` and its like make rich take a file for a terminal, which would fill a log with control codes; the stream
    of a notebook may say that it is one.
    """
    console = Console()
    return bool(console.file.isatty()) and not console.is_dumb_terminal and not console.is_jupyter


def write_line(text: str) -> None:
    """Write a line to the standard output, at once even where it is buffered."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def print_table(title: str, *, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: with lines and colours on a terminal (`NO_COLOR` is honoured), in plain columns elsewhere.

    Args:
        title: stands above it.
        columns: heads; empty strings for a table without heads.
        rows: cells, as many as there are columns.
    """
    if is_terminal():
        table = Table(title=title, title_justify="left", show_header=any(columns))
        for number, column in enumerate(columns):
            table.add_column(column, style="bold" if number == 0 else None, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table, markup=False)
        return
    cells = [columns, *rows] if any(columns) else list(rows)
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    write_line("\n".join([title, *(f"  {line}" for line in lines)]))
