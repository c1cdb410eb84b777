"""If these fail, two parameters share memory, or one is cut where a cut changes its bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbolt.errors import ConfigError
from meshbolt.offload.layout import CHUNK_BYTES, PAGE_BYTES, VECTOR_BYTES, Layout, Slot, StateChunk, which_stay

COLUMNS = ("master", "exp_avg", "exp_avg_sq")


def slots(sizes: list[int], *, dtype: torch.dtype = torch.float32, columns: tuple[str, ...] = COLUMNS) -> list[Slot]:
    return [Slot(unit=f"unit {size % 2}", numel=size, dtype=dtype, columns=columns) for size in sizes]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 9000)), min_size=1, max_size=30),
    later=st.lists(st.integers(0, 3000), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    columns=st.sampled_from([(), ("momentum",), COLUMNS]),
    chunk_bytes=st.sampled_from([PAGE_BYTES, 10_000, CHUNK_BYTES]),
)
def test_every_element_has_one_place(
    sizes: list[int], later: list[int], dtype: torch.dtype, columns: tuple[str, ...], chunk_bytes: int
) -> None:
    layout = Layout(slots(sizes, dtype=dtype, columns=columns), chunk_bytes=chunk_bytes)
    layout.add(slots(later, dtype=dtype, columns=columns))
    vector = VECTOR_BYTES // dtype.itemsize
    found: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(sizes + later))}
    for chunk in layout.chunks:
        section = layout.sections[chunk.section]
        assert chunk.column_bytes * len(chunk.columns) <= chunk_bytes
        assert chunk.elements > 0
        assert chunk.first + chunk.elements <= section.elements
        end = 0
        for piece in chunk.pieces:
            assert chunk in layout.chunks_of([piece.slot])
            assert piece.number == len(found[piece.slot])
            assert piece.offset >= end
            assert piece.offset % vector == piece.start % vector == 0
            assert chunk.first + piece.offset == section.places[piece.slot] + piece.start
            end = piece.offset + piece.stop - piece.start
            assert end <= chunk.elements
            found[piece.slot].append((piece.start, piece.stop))
    for number, size in enumerate(sizes + later):
        assert layout.pieces_of(number) == len(found[number]) >= 1
        assert found[number][0][0] == 0
        assert found[number][-1][1] == size
        assert all(a[1] == b[0] for a, b in zip(found[number], found[number][1:], strict=False))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=20))
def test_chunks_follow_each_other_in_a_file_and_their_columns_in_a_chunk(sizes: list[int]) -> None:
    layout = Layout(slots(sizes), chunk_bytes=PAGE_BYTES)
    end = 0
    for chunk in layout.chunks:
        assert chunk.file_offset == end
        assert chunk.num_bytes % PAGE_BYTES == 0
        end += chunk.num_bytes
        run = torch.zeros(chunk.num_bytes, dtype=torch.uint8)
        for value, column in enumerate(chunk.columns_in(run).values(), start=1):
            assert column.shape == (chunk.elements,)
            assert column.dtype == torch.float32
            assert not column.any()
            column.fill_(value)
        assert [float(column[-1]) for column in chunk.columns_in(run).values()] == [1.0, 2.0, 3.0]
    assert layout.file_bytes == end
    assert layout.largest_chunk_bytes == max(chunk.num_bytes for chunk in layout.chunks)


def test_one_parameter_is_cut_into_chunks_of_about_one_size() -> None:
    layout = Layout(slots([1_000_000]), chunk_bytes=5_000_000)
    sizes = [chunk.elements for chunk in layout.chunks]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) < 3 * 1024


def test_large_columns_begin_at_different_places_of_a_page() -> None:
    memory = Layout(slots([1_000_000, 500_000]), chunk_bytes=5_000_000)
    lengths = [section.elements for section in memory.sections] + [chunk.elements for chunk in memory.chunks[:-1]]
    assert all((number * length * 4) % PAGE_BYTES for length in lengths[:3] for number in (1, 2))


def test_hundreds_of_tiny_parameters_share_a_chunk() -> None:
    assert len(Layout(slots([3] * 500)).chunks) == 1


def test_state_that_stays_has_no_place_in_the_file() -> None:
    both = [
        Slot(unit="a", numel=100, dtype=torch.float32, columns=COLUMNS),
        Slot(unit="a", numel=100, dtype=torch.float32, columns=COLUMNS[1:], stays=True),
    ]
    layout = Layout(both)
    chunks: dict[bool, StateChunk] = {chunk.stays: chunk for chunk in layout.chunks}
    assert layout.file_bytes == chunks[False].num_bytes == PAGE_BYTES
    assert layout.bytes_of(stays=True) == 2 * 112 * 4
    assert layout.bytes_of(stays=False) == 3 * 112 * 4


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, [False, False, False, False]),
        (9, [False, True, False, True]),
        (37, [True, True, True, True]),
        (17, [True, True, False, True]),
    ],
)
def test_the_first_parameters_that_fit_stay(budget: int, expected: list[bool]) -> None:
    assert which_stay([10, 3, 20, 4], budget=budget) == expected


def test_chunks_without_room_are_refused() -> None:
    with pytest.raises(ConfigError, match="Chunks of 100 bytes are too small"):
        Layout(chunk_bytes=100)
