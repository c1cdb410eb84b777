"""If these fail, state that goes to a file and back is not what it was, or threads and space outlive the file."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.offload.faulty import PAGE, FaultyFace, make_file

from meshbolt.errors import ConfigError, StorageError
from meshbolt.offload import StateFile, Traffic, aligned_empty

PAGES = 48
# (first page, pages, byte to write; None: read and compare)
TRANSFERS = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES), st.none() | st.integers(0, 255)),
    min_size=1,
    max_size=30,
)


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("meshbolt: ")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    transfers=TRANSFERS, block_pages=st.integers(1, 5), threads=st.integers(1, 4), seed=st.none() | st.integers(0, 99)
)
def test_random_reads_and_writes_are_those_of_memory(
    tmp_path: Path, transfers: list[tuple[int, int, int | None]], block_pages: int, threads: int, seed: int | None
) -> None:
    """With a seed the system moves fewer bytes than asked for, as it may."""
    chance = random.Random(seed)
    face = FaultyFace(lambda what, offset, size: size if seed is None else chance.randint(min(size, PAGE), size))
    memory = bytearray(PAGES * PAGE)
    with make_file(tmp_path, PAGES * PAGE, face=face, block_bytes=block_pages * PAGE, threads=threads) as file:
        for first, count, value in transfers:
            count = min(count, PAGES - first)
            part = slice(first * PAGE, (first + count) * PAGE)
            buffer = aligned_empty(count * PAGE)
            if value is None:
                file.read(buffer, part.start).wait()
                assert buffer.numpy().tobytes() == memory[part]
            else:
                buffer.copy_(torch.arange(buffer.nbytes).add_(value))
                memory[part] = buffer.numpy().tobytes()
                file.write(buffer, part.start).wait()


def test_many_transfers_under_way_at_once_do_not_mix(tmp_path: Path) -> None:
    buffers = [aligned_empty(8 * PAGE).fill_(number) for number in range(20)]
    with make_file(tmp_path, 160 * PAGE) as file:
        written = [file.write(buffer, number * 8 * PAGE) for number, buffer in enumerate(buffers)]
        for request in written:
            request.wait()
        back = [aligned_empty(8 * PAGE) for _ in buffers]
        read = [file.read(buffer, number * 8 * PAGE) for number, buffer in enumerate(back)]
        for request, before, after in zip(read, buffers, back, strict=True):
            request.wait()
            assert torch.equal(before, after)


def test_several_blocks_are_with_the_disk_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=10)

    def meets(_what: str, _offset: int, num_bytes: int) -> int:
        together.wait()  # raises unless three are here
        return num_bytes

    with make_file(tmp_path, 6 * PAGE, face=FaultyFace(meets), threads=3) as file:
        file.write(aligned_empty(6 * PAGE), 0).wait()


def test_tensors_of_any_dtype_come_back_as_they_were(tmp_path: Path) -> None:
    with make_file(tmp_path, 16 * PAGE) as file:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            data, back = (aligned_empty(16 * PAGE).view(dtype) for _ in range(2))
            data.normal_()
            file.write(data, 0).wait()
            file.read(back, 0).wait()
            assert torch.equal(data, back)


def test_a_size_that_ends_within_a_page_is_rounded_up(tmp_path: Path) -> None:
    with make_file(tmp_path, 3 * PAGE + 1) as file:
        assert file.num_bytes == 4 * PAGE
        file.write(aligned_empty(PAGE), 3 * PAGE).wait()


def test_a_request_keeps_its_buffer_alive(tmp_path: Path) -> None:
    go = threading.Event()

    def waits(_what: str, _offset: int, num_bytes: int) -> int:
        assert go.wait(10)
        return num_bytes

    with make_file(tmp_path, 4 * PAGE, face=FaultyFace(waits), threads=1) as file:
        request = file.write(aligned_empty(4 * PAGE).fill_(6), 0)
        gc.collect()
        assert not request.done
        go.set()
        request.wait()
        assert request.done
        back = aligned_empty(4 * PAGE)
        file.read(back, 0).wait()
        assert back.eq(6).all()


@pytest.mark.parametrize(("offset", "pages"), [(-PAGE, 1), (1, 1), (512, 1), (PAGE, 4), (4 * PAGE, 1)])
def test_a_place_outside_of_the_file_or_within_a_page_is_refused(tmp_path: Path, offset: int, pages: int) -> None:
    with make_file(tmp_path, 4 * PAGE) as file:
        for begin in (file.read, file.write):
            with pytest.raises(ConfigError, match=f"at offset {offset} are no part of a file of {4 * PAGE} bytes"):
                begin(aligned_empty(pages * PAGE), offset)


@pytest.mark.parametrize(
    "options", [{"num_bytes": 0}, {"threads": 0}, {"block_bytes": 100}, {"block_bytes": 0}, {"timeout_seconds": 0}]
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="all are to be positive"):
        make_file(tmp_path, **{"num_bytes": PAGE, **options})
    assert not our_threads()


def test_closing_waits_for_what_is_under_way_and_ends_the_threads(tmp_path: Path) -> None:
    face = FaultyFace(lambda what, offset, size: time.sleep(0.02) or size)
    file = make_file(tmp_path, 8 * PAGE, face=face, threads=2)
    request = file.write(aligned_empty(8 * PAGE), 0)
    descriptor = file._scratch.fd
    assert our_threads()
    file.close()
    assert request.done
    request.wait()
    assert not our_threads()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    file.close()  # again: nothing


def test_a_closed_file_is_refused(tmp_path: Path) -> None:
    file = make_file(tmp_path, PAGE)
    file.close()
    assert file.closed
    with pytest.raises(StorageError, match="It was closed"):
        file.read(aligned_empty(PAGE), 0)


def test_a_file_that_was_forgotten_ends_its_threads_and_gives_its_space_back(tmp_path: Path) -> None:
    file: StateFile | None = make_file(tmp_path, PAGE)
    assert file is not None
    file.write(aligned_empty(PAGE), 0).wait()
    descriptor = file._scratch.fd
    file = None
    gc.collect()
    for thread in our_threads():
        thread.join(5)
    assert not our_threads()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_what_was_moved_is_counted_with_the_seconds_it_took(tmp_path: Path) -> None:
    slept: list[float] = []

    def slow(_what: str, _offset: int, num_bytes: int) -> int:
        start = time.perf_counter()
        time.sleep(0.05)
        slept.append(time.perf_counter() - start)
        return num_bytes

    with make_file(tmp_path, 8 * PAGE, face=FaultyFace(slow), threads=4) as file:
        before = file.traffic
        file.write(aligned_empty(8 * PAGE), 0).wait()
        middle, of_all_blocks = file.traffic, sum(slept)
        file.read(aligned_empty(2 * PAGE), 0).wait()
        written, read = middle - before, file.traffic - middle
    assert (written.written_bytes, written.read_bytes, written.read_seconds) == (8 * PAGE, 0, 0.0)
    assert (read.read_bytes, read.written_bytes, read.write_seconds) == (2 * PAGE, 0, 0.0)
    # Seconds in which several blocks were under way count once.
    assert 0.1 <= written.write_seconds < 0.8 * of_all_blocks
    assert read.read_seconds >= 0.05


def test_a_block_under_way_counts_in_the_seconds(tmp_path: Path) -> None:
    go = threading.Event()

    def waits(_what: str, _offset: int, num_bytes: int) -> int:
        assert go.wait(10)
        return num_bytes

    face = FaultyFace(waits)
    with make_file(tmp_path, PAGE, face=face) as file:
        request = file.read(aligned_empty(PAGE), 0)
        while not face.asked:
            time.sleep(0.001)
        time.sleep(0.02)
        assert file.traffic.read_seconds >= 0.02
        assert file.traffic.read_bytes == 0
        go.set()
        request.wait()
        assert file.traffic.read_bytes == PAGE


def test_traffic_is_zero_at_first() -> None:
    assert Traffic() - Traffic() == Traffic(0, 0.0, 0, 0.0)
