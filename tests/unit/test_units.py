"""If these fail, sizes and durations are printed wrong."""

import pytest

from meshbolt.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_take_the_largest_unit_that_keeps_them_above_one(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12.3 ms"), (1, "1.0 s"), (75, "1:15"), (3601, "1:00:01"), (59.94, "59.9 s")]
)
def test_durations_grow_from_milliseconds_to_hours(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 2**29), ("5GB", 5 * 10**9), ("1.5 gib", 3 * 2**29), (" 7 B ", 7), ("100", 100), ("2KB", 2000)],
)
def test_sizes_in_words_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "3GX", "-1", "1e3", "3 4"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)
