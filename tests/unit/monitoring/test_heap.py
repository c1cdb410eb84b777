from __future__ import annotations

import pytest
import torch

from meshbolt.monitoring import heap
from meshbolt.monitoring.heap import Heap
from meshbolt.monitoring.memory import ProcessGauge

MIB = 2**20


@pytest.mark.skipif(Heap().allocated_bytes() is None, reason="this C library does not say what is allocated")
def test_tensors_count_as_long_as_they_live() -> None:
    gauge = ProcessGauge()
    sizes = [gauge.heap_bytes()]
    tensors = [torch.empty(size) for size in (1000, MIB, 50)]
    sizes.append(gauge.heap_bytes())
    tensors.clear()
    sizes.append(gauge.heap_bytes())
    before, with_tensors, after = (size or 0 for size in sizes)
    assert with_tensors - before == pytest.approx(4 * (1000 + MIB + 50), abs=16 * 1024)
    assert after == pytest.approx(before, abs=16 * 1024)


def test_an_allocator_whose_tensors_are_not_seen_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_found", lambda: heap._Info)  # always zeros
    assert Heap().allocated_bytes() is None


def test_nothing_is_asked_again_where_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Heap()
    if asked.allocated_bytes() is None:
        pytest.skip("this C library does not say what is allocated")
    monkeypatch.setattr(heap, "_SLOW_SECONDS", 0.0)
    assert asked.allocated_bytes() is not None
    assert asked.allocated_bytes() is None
