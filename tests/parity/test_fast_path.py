"""torch's own collectives give the training that the faster ones give in the matrix: the one of a single process."""

from __future__ import annotations

import pytest
from tests.parity.matrix import Row

from meshbolt import environment
from meshbolt.testing.parity.assertion import check, meshed_records, reference_records

TIMEOUT_SECONDS = 100


def rows(strategies: tuple[str, ...], ranks: int) -> list[Row]:
    """Return rows with windows of one and of three batches, in both loops and two precisions."""
    return [
        Row(
            feature="small",
            strategy=strategy,
            precision=precision,
            ranks=ranks,
            window=window,
            clip="norm",
            loop=loop,
        )
        for strategy in strategies
        for precision, window, loop in (
            ("64-true", 1, "fabric"),
            ("64-true", 3, "trainer"),
            ("bf16-mixed", 3, "fabric"),
        )
    ]


@pytest.mark.parametrize(("strategies", "ranks"), [(("zero1", "zero2", "zero3"), 3), (("hsdp1", "hsdp2", "hsdp3"), 4)])
def test_rows_train_as_one_process_does_without_the_fast_path(
    strategies: tuple[str, ...], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = rows(strategies, ranks)
    monkeypatch.setenv(environment.FAST_PATH, "0")
    records = meshed_records([row.case() for row in without], timeout=TIMEOUT_SECONDS)
    wanted = list(dict.fromkeys(row.reference() for row in without))
    made = reference_records([(row.case(), row.zero()) for row in wanted], timeout=TIMEOUT_SECONDS)
    references = dict(zip(wanted, made, strict=True))
    for row, record in zip(without, records, strict=True):
        check(row.case(), record, references[row.reference()])
