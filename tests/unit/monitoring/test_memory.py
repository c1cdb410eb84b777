"""If these fail, memory of a process is not what the kernel says, or a peak is an older one's."""

from __future__ import annotations

import torch

from meshbolt.monitoring.memory import (
    METRICS,
    gauge_of,
    memory_limit_bytes,
    peak_before_resets,
    process_bytes,
)

MIB = 2**20
CPU = torch.device("cpu")


def test_a_gauge_sees_what_is_taken_and_its_peak_begins_anew() -> None:
    gauge = gauge_of(CPU)
    gauge.reset_peak()
    before = gauge.read()
    kept = torch.ones(64 * MIB // 4)
    taken = gauge.read()
    assert 60 * MIB <= taken.used_bytes - before.used_bytes <= 70 * MIB
    del kept
    freed = gauge.read()
    assert freed.used_bytes - before.used_bytes <= 10 * MIB
    assert freed.peak_bytes - before.used_bytes >= 60 * MIB
    gauge.reset_peak()
    assert gauge.read().peak_bytes - before.used_bytes <= 10 * MIB
    # What somebody else measures over the whole run is still known.
    assert peak_before_resets(CPU) >= freed.peak_bytes


def test_a_process_has_less_than_its_machine() -> None:
    assert 0 < process_bytes() < memory_limit_bytes() == gauge_of(CPU).limit_bytes


def test_names_are_of_one_kind() -> None:
    assert {metric.kind for metric in METRICS} == {"memory"}
