"""Parts of what `meshbolt explain` shows: each a table with values and where they are from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from meshbolt.callbacks.console import print_table
from meshbolt.cli.planned import Row
from meshbolt.deepspeed_json import Receipt, Translation
from meshbolt.deepspeed_json.effective import Effective, optimizer_values, scheduler_values, trainer_values

_COLUMNS = ("setting", "value", "where from")


class Section(NamedTuple):
    """One table.

    Attributes:
        name: for programs.
        title: for people.
        rows: its values.
    """

    name: str
    title: str
    rows: Sequence[Row]


class Explanation(NamedTuple):
    """All that is shown.

    Attributes:
        sections: in their order; those without rows are passed over, but for programs.
        receipt: what became of each key of a DeepSpeed file; None without one.
    """

    sections: Sequence[Section]
    receipt: Receipt | None = None

    def as_data(self) -> dict[str, Any]:
        """Return everything as plain data: by section and setting its value and where that is from."""
        data: dict[str, Any] = {
            section.name: {row.key: {"value": row.value, "from": row.origin} for row in section.rows}
            for section in self.sections
        }
        if self.receipt is not None:
            data["receipt"] = self.receipt.as_data()
        return data

    def show(self) -> None:
        """Print the tables."""
        for section in self.sections:
            if section.rows:
                print_table(section.title, columns=_COLUMNS, rows=_as_text(section.rows))
        if self.receipt is not None:
            title = f"what becomes of {self.receipt.source}"
            print_table(title, columns=Receipt.COLUMNS, rows=self.receipt.cells())


def sections_of_deepspeed(made: Translation) -> list[Section]:
    """Return what a DeepSpeed file sets beside the plan.

    Args:
        made: what the file came to.
    """
    parts: Sequence[tuple[str, str, Sequence[Effective]]] = (
        ("trainer", "Trainer", trainer_values(made)),
        ("optimizer", "optimizer, where the module makes none", optimizer_values(made)),
        ("scheduler", "scheduler, where the module gives none", scheduler_values(made)),
    )
    return [Section(name, title, [Row(*each) for each in rows]) for name, title, rows in parts]


def _as_text(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return the rows of a table; a mapping takes one for each of its keys."""
    lines: list[tuple[str, str, str]] = []
    for row in rows:
        if isinstance(row.value, Mapping) and row.value:
            (first, *others) = (f"{key}: {_write(value)}" for key, value in row.value.items())
            lines += [(row.key, first, row.origin), *(("", other, "") for other in others)]
        else:
            lines.append((row.key, _write(row.value), row.origin))
    return lines


def _write(value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(each, dict) and "class_path" in each for each in value):
        return ", ".join(each["class_path"] for each in value)
    return value if isinstance(value, str) else json.dumps(value, default=str)
