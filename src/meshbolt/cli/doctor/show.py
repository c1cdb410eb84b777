"""Rows as a table for people, or as JSON; and a line that says what is being looked at."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType

from meshbolt.cli.doctor.rows import Check, Row


def as_json(rows: Sequence[Row]) -> str:
    """Return rows for a program."""
    content = {
        "red": sum(row.status == "red" for row in rows),
        "yellow": sum(row.status == "yellow" for row in rows),
        "rows": [{**vars(row), "measured": dict(row.measured)} for row in rows],
    }
    return json.dumps(content, indent=2)


def print_rows(rows: Sequence[Row]) -> None:
    """Print a table, in colours where the output is a terminal (`NO_COLOR` is honoured), and below it what to do."""
    if not (sys.stdout.isatty() and _print_rich(rows)):
        widths = [max(len(cell) for cell in column) for column in zip(*map(_cells, rows), strict=True)]
        for row in rows:
            line = "  ".join(cell.ljust(width) for cell, width in zip(_cells(row), widths, strict=True))
            sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.write("".join(f"{line}\n" for line in closing(rows)))


def closing(rows: Sequence[Row]) -> list[str]:
    """Return the lines below the table: a command for each row that is not green, to be copied, and a verdict."""
    lines: list[str] = []
    for status in ("red", "yellow"):
        found = [row for row in rows if row.status == status and row.mend]
        if found:
            lines += ["", f"{status}:"]
        for row in found:
            lines += [f"  {row.area}, {row.name}", f"    {row.mend}"]
    counts = {status: sum(row.status == status for row in rows) for status in ("green", "yellow", "red")}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    verdict = "training fails, or will, for the red ones" if counts["red"] else "nothing stands in the way of training"
    return [*lines, "", f"{summary}: {verdict}"]


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.status, row.area, row.name, " ".join(row.value.split())


def _print_rich(rows: Iterable[Row]) -> bool:
    """Print with rich; return False where that is broken, too."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except Exception:
        return False
    table = Table(title="meshbolt doctor", title_justify="left")
    for column in ("", "area", "what", "found"):
        table.add_column(column, overflow="fold")
    before = ""
    for row in rows:
        if before not in ("", row.area):
            table.add_section()
        status, area, name, value = _cells(row)
        table.add_row(Text(status, style=status), "" if before == area else area, name, Text(value))
        before = area
    Console().print(table)
    return True


class Progress:
    """A line on a terminal that says what is being looked at; elsewhere a line for what takes seconds; to the standard error.

    Args:
        show: False says nothing.
    """

    def __init__(self, *, show: bool) -> None:
        self._show, self._live, self._width = show, sys.stderr.isatty(), 0

    def before(self, check: Check) -> None:
        """Say what comes next."""
        if self._show and self._live:
            text = f"looking at {check.doing} ..."
            sys.stderr.write(f"\r{text.ljust(self._width)}")
            self._width = len(text)
        elif self._show and check.is_long:
            sys.stderr.write(f"looking at {check.doing} ...\n")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._show and self._live:
            sys.stderr.write(f"\r{' ' * self._width}\r")
            sys.stderr.flush()
