"""The page of keys and the receipts of the files are those of the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.deepspeed_json.page import CONFIGS, DOCUMENT, RECEIPTS, page, receipts

from meshbolt.deepspeed import trainer_arguments
from meshbolt.deepspeed_json import translate

WRITE = "run `python -m tests.unit.deepspeed_json.page`"
FILES = sorted(CONFIGS.glob("*.json"))


def test_the_page_is_that_of_the_table() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page(), WRITE


def test_receipts_of_the_files_are_as_expected() -> None:
    made = receipts()
    assert sorted(made) == sorted(RECEIPTS.iterdir()), WRITE
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: {WRITE}"


def ranks_for(file: Path) -> int | None:
    """Return a number of ranks that goes with a file, where accumulation follows from it."""
    batch = translate(str(file)).batch
    return 8 if batch.quotient is not None else None


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_makes_a_strategy(file: Path) -> None:
    made = trainer_arguments(str(file), show=False, data_parallel_size=ranks_for(file))
    assert made["strategy"].deepspeed_receipt.rows
