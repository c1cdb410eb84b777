"""Under `16-mixed`, steps whose gradients overflow are skipped by all ranks, as torch's own scaler skips them."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from meshbolt.plugins import MixedPrecision
from meshbolt.testing.parity.assertion import check, meshed_records, reference_records
from meshbolt.testing.parity.case import Case
from meshbolt.testing.parity.record import Record
from tests.parity.matrix import STRATEGIES, Row

# So large that the first steps overflow, and so small that the last ones do not.
SCALE = 2.0**20
PLUGIN = functools.partial(MixedPrecision, "16-mixed", "cpu", init_scale=SCALE, growth_interval=2)


def case_of(strategy: str, *, window: int) -> Case:
    row = Row(feature="small", strategy=strategy, precision="16-mixed", ranks=4, window=window, optimizer="AdamW")
    return replace(row.case(), precision=PLUGIN, steps=8 // window, loop="trainer" if window == 1 else "fabric")


def overflowed(record: Record) -> list[bool]:
    """Return for each step whether any gradient was inf or NaN."""
    steps = 1 + max(int(name.split(":")[0].removeprefix("step ")) for name in record.gradients)
    return [
        any(not g.isfinite().all() for name, g in record.gradients.items() if name.startswith(f"step {step}:"))
        for step in range(steps)
    ]


@pytest.mark.parametrize("window", [1, 2])
def test_overflows_are_skipped_as_in_one_process(window: int) -> None:
    cases = [case_of(strategy, window=window) for strategy in STRATEGIES]
    records = meshed_records(cases, timeout=100)
    reference = reference_records([(cases[0], False)], timeout=60)[0]
    skipped = overflowed(reference)
    assert skipped[0]
    assert not skipped[-1]
    for case, record in zip(cases, records, strict=True):
        assert overflowed(record) == skipped
        check(case, record, reference)
