"""If these fail, a chart is labelled with numbers that are not where they stand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbolt.monitoring.report.axes import axis_of_steps, axis_of_values

UNITS = ["", "bytes", "bytes/s", "seconds", "fraction", "tokens/s"]


@given(
    st.lists(st.floats(-1e12, 1e12, allow_subnormal=False), min_size=1, max_size=20),
    st.sampled_from(UNITS),
    st.booleans(),
)
def test_every_value_and_every_tick_is_on_the_axis(values: list[float], unit: str, from_zero: bool) -> None:
    axis = axis_of_values(values, unit, from_zero=from_zero)

    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in values)
    assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick, _ in axis.ticks)
    assert len(axis.ticks) <= 12


@given(st.floats(1e-6, 1e9), st.floats(1.5, 1e6))
def test_what_spreads_over_powers_of_ten_still_has_its_values_inside(low: float, factor: float) -> None:
    values = [low, low, low, low * factor]
    axis = axis_of_values(values, "", from_zero=False)

    assert axis.is_logarithmic == (values[-1] / values[2] > 50)
    assert 0 <= axis.place(low) < axis.place(low * factor) <= 1


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([0.0, 10.0], "", ["0", "5", "10"]),
        ([3 * 2**30], "bytes", ["0", "1 GiB", "2 GiB", "3 GiB"]),
        ([0.21], "seconds", ["0", "100 ms", "200 ms"]),
        ([0.9], "fraction", ["0", "25 %", "50 %", "75 %"]),
        ([2e4], "tokens/s", ["0", "10k", "20k"]),
    ],
)
def test_ticks_are_round_numbers_in_the_unit(values: list[float], unit: str, expected: list[str]) -> None:
    assert [text for _, text in axis_of_values(values, unit, from_zero=True).ticks] == expected


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_ticks_of_steps_are_whole(first: int, length: int) -> None:
    axis = axis_of_steps(first, first + length)

    assert all(tick == int(tick) and first <= tick <= max(first + length, first + 1) for tick, _ in axis.ticks)
    assert len(axis.ticks) <= 7


def test_nothing_and_a_single_value_have_an_axis_too() -> None:
    for values in ([], [0.0], [5.0], [-3.0]):
        axis = axis_of_values(values, "", from_zero=False)
        assert axis.low < axis.high
        assert all(math.isfinite(tick) for tick, _ in axis.ticks)
