"""What became of every key of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshbolt.deepspeed_json.key import Outcome


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one key.

    Attributes:
        key: dotted, from the top of the file.
        value: as the file has it; None where it does not.
        given: whether the file has it; a row without tells of a default that DeepSpeed's versions differ in, or that matters.
        outcome: honoured, mapped or ignored.
        becomes: the setting of meshbolt's or of the Trainer's, with its value.
        why: the reason, or what differs.
    """

    key: str
    value: Any
    given: bool = True
    outcome: Outcome
    becomes: str
    why: str


@dataclass(frozen=True)
class Receipt:
    """What became of every key of a file.

    Attributes:
        source: the file.
        rows: one for each key, in the order of the file, then those of defaults.
    """

    source: str
    rows: tuple[Row, ...]

    COLUMNS: ClassVar[tuple[str, ...]] = ("key", "value", "what became of it", "setting", "why")

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows."""
        return iter(self.rows)

    def of(self, key: str) -> Row:
        """Return the row of a key.

        Args:
            key: dotted.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.key == key:
                return row
        raise KeyError(key)

    def cells(self) -> Sequence[Sequence[str]]:
        """Return the cells of a table, one row for each key."""
        return [
            (row.key, json.dumps(row.value) if row.given else "(not given)", row.outcome, row.becomes, row.why)
            for row in self.rows
        ]

    def as_data(self) -> list[dict[str, Any]]:
        """Return the rows as plain data."""
        return [asdict(row) for row in self.rows]

    def to_json(self) -> str:
        """Return the receipt as JSON: a list with an object for each row."""
        return json.dumps(self.as_data(), indent=2) + "\n"

    def show(self) -> None:
        """Print the receipt: as a table on a terminal, as a line for each key elsewhere."""
        console = Console()
        if not console.file.isatty() or console.is_dumb_terminal:
            for key, value, outcome, becomes, why in self.cells():
                then, reason = (f" -> {becomes}" if becomes else ""), (f" ({why})" if why else "")
                console.file.write(f"{self.source}: {key} = {value}: {outcome}{then}{reason}\n")
            return
        table = Table(title=f"What becomes of {self.source}", title_justify="left")
        for number, column in enumerate(self.COLUMNS):
            table.add_column(column, style="bold" if number == 0 else None, overflow="fold")
        for row in self.cells():
            table.add_row(*map(Text, row))
        console.print(table)
