"""The tables of `docs/parity.md`, from the rows of the matrix; run `python -m tests.parity.table` to write them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tests.parity.matrix import FEATURES, OPTIMIZERS, PRECISIONS, STRATEGIES, Row, all_rows

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- rows: written by tests/parity/table.py -->\n", "<!-- end of rows -->"


def tables() -> str:
    """Return the tables: how many comparisons there are of each feature, precision and optimizer under each strategy."""
    rows = all_rows()
    parts = [
        f"{len(rows)} comparisons in all; the numbers are how many there are of each pair.\n",
        _table("a module with", [(feature.name, feature.words) for feature in FEATURES.values()], rows, _feature),
        _table("precision", [(name, f"`{name}`") for name in PRECISIONS], rows, _precision),
        _table("optimizer", [(name, f"`{name}`") for name in OPTIMIZERS], rows, _optimizer),
    ]
    return "\n".join(parts)


def _table(head: str, lines: Sequence[tuple[str, str]], rows: Iterable[Row], column: Callable[[Row], str]) -> str:
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (column(row), row.strategy)
        counts[key] = counts.get(key, 0) + 1
    written = [f"| {head} | {' | '.join(_headings(STRATEGIES))} |", f"|---|{'---|' * len(STRATEGIES)}"]
    for value, words in lines:
        written.append(f"| {words} | {' | '.join(str(counts.get((value, s), '')) for s in STRATEGIES)} |")
    return "\n".join(written) + "\n"


def _headings(strategies: Mapping[str, object]) -> list[str]:
    return [name.replace("hsdp", "HSDP, zero") if name.startswith("hsdp") else name for name in strategies]


def _feature(row: Row) -> str:
    return row.feature


def _precision(row: Row) -> str:
    return row.precision


def _optimizer(row: Row) -> str:
    return row.optimizer


def with_tables(text: str) -> str:
    """Return the document with the tables as they should be."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
