"""Under `16-mixed`, steps whose gradients overflow are skipped by all ranks, as torch's own scaler skips them."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from tests.parity.matrix import STRATEGIES, Row

from meshbolt import Zero
from meshbolt.plugins import MixedPrecision
from meshbolt.testing.parity.assertion import check, meshed_records, reference_records
from meshbolt.testing.parity.case import Case
from meshbolt.testing.parity.record import Record


def case_of(strategy: str, *, window: int, scale: float) -> Case:
    row = Row(feature="small", strategy=strategy, precision="16-mixed", ranks=4, window=window, optimizer="AdamW")
    plugin = functools.partial(MixedPrecision, "16-mixed", "cpu", init_scale=scale, growth_interval=2)
    return replace(row.case(), precision=plugin, loop="trainer" if window == 1 else "fabric")


def overflowed(record: Record) -> list[bool]:
    """Return for each step whether any gradient was inf or NaN."""
    steps = 1 + max(int(name.split(":")[0].removeprefix("step ")) for name in record.gradients)
    return [
        any(not g.isfinite().all() for name, g in record.gradients.items() if name.startswith(f"step {step}:"))
        for step in range(steps)
    ]


# The scales are so large that some steps overflow, and so small that not all do.
@pytest.mark.parametrize(("window", "scale"), [(1, 2.0**14), (3, 2.0**17)])
def test_overflows_are_skipped_as_in_one_process(window: int, scale: float) -> None:
    cases = [case_of(strategy, window=window, scale=scale) for strategy in STRATEGIES]
    records = meshed_records(cases, timeout=100)
    reference = reference_records([(cases[0], Zero(stage=0))], timeout=60)[0]
    skipped = overflowed(reference)
    assert True in skipped
    assert False in skipped
    for case, record in zip(cases, records, strict=True):
        assert overflowed(record) == skipped
        check(case, record, reference)
