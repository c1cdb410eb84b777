"""If these fail, a report hides a value that was there, or shows one that was not."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbolt.monitoring.report.envelope import Envelope

Steps = st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6)), min_size=1, max_size=300)


@given(Steps, st.integers(1, 20))
def test_no_value_is_outside_of_what_is_kept_and_none_is_lost(values: list[tuple[int, float]], most: int) -> None:
    envelope = Envelope(most)
    for step, value in values:
        envelope.add(step, value)
    stretches = envelope.stretches()

    assert len(stretches) <= most
    assert sum(each.count for each in stretches) == len(values)
    assert min(each.lowest for each in stretches) == min(value for _, value in values)
    assert max(each.highest for each in stretches) == max(value for _, value in values)
    assert math.fsum(each.total for each in stretches) == pytest.approx(
        math.fsum(value for _, value in values), abs=1e-3
    )
    for step, value in values:
        assert any(each.first <= step <= each.last and each.lowest <= value <= each.highest for each in stretches)


@given(Steps)
def test_stretches_follow_each_other(values: list[tuple[int, float]]) -> None:
    envelope = Envelope(7)
    for step, value in values:
        envelope.add(step, value)
    stretches = envelope.stretches()

    assert all(before.last < after.first for before, after in itertools.pairwise(stretches))


def test_a_single_jump_among_many_steps_is_kept() -> None:
    envelope = Envelope(300)
    for step in range(100_000):
        envelope.add(step, 9.0 if step == 54_321 else 1.0)

    (jump,) = [each for each in envelope.stretches() if each.highest > 1]
    assert jump.first <= 54_321 <= jump.last
    assert envelope.highest == (54_321, 9.0)
    assert envelope.is_thinned


def test_few_values_are_kept_one_by_one() -> None:
    envelope = Envelope(300)
    for step in range(300):
        envelope.add(step, float(step))

    assert not envelope.is_thinned
    assert [each.mean for each in envelope.stretches()] == [float(step) for step in range(300)]


def test_what_is_no_number_leaves_its_place_empty_and_is_counted() -> None:
    envelope = Envelope(10)
    for step, value in [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)]:
        envelope.add(step, value)

    assert [each.count for each in envelope.stretches()] == [1, 0, 0, 1]
    assert math.isnan(envelope.stretches()[1].mean)
    assert (envelope.num_not_finite, envelope.first_not_finite) == (2, 2)
    assert envelope.highest == (4, 2.0)
