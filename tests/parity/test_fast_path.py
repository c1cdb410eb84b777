"""The faster collectives and torch's own give the same training, each as one process does."""

from __future__ import annotations

import pytest

from meshbolt import environment
from meshbolt.testing.parity.assertion import check, meshed_records, reference_records
from meshbolt.testing.parity.report import compare, limits_for
from tests.parity.matrix import Row

TIMEOUT_SECONDS = 100


def rows(precision: str, strategies: tuple[str, ...]) -> list[Row]:
    """Return rows with windows of one and of three batches, in both loops."""
    return [
        Row(
            feature="small",
            strategy=strategy,
            precision=precision,
            ranks=4 if strategy.startswith("hsdp") else 3,
            window=window,
            clip="norm",
            loop=loop,
        )
        for strategy in strategies
        for window, loop in ((1, "fabric"), (3, "trainer"))
    ]


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("strategies", [("zero1", "zero2", "zero3"), ("hsdp1", "hsdp2", "hsdp3")])
def test_rows_are_equal_with_and_without_the_fast_path(
    precision: str, strategies: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [row.case() for row in rows(precision, strategies)]
    fast = meshed_records(cases, timeout=TIMEOUT_SECONDS)
    monkeypatch.setenv(environment.FAST_PATH, "0")
    plain = meshed_records(cases, timeout=TIMEOUT_SECONDS)
    references = reference_records([(case, False) for case in cases], timeout=TIMEOUT_SECONDS)
    for case, one, other, reference in zip(cases, fast, plain, references, strict=True):
        check(case, other, reference)
        assert not compare(one, other, limits=limits_for(precision, reference)).differences
