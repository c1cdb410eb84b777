"""The page on parity says what the matrix has."""

from __future__ import annotations

from tests.parity.table import DOCUMENT, with_tables


def test_the_tables_of_the_page_are_those_of_the_matrix() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_tables(text), "run `python -m tests.parity.table`"
