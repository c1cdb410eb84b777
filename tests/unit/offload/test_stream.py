"""If these fail, state that is updated through a file is not updated as in memory, waits for the disk, or outlives an error."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.offload.faulty import PAGE, FaultyFace, cut, error_of, make_file

from meshbolt.errors import ConfigError, StorageError
from meshbolt.offload import Chunk, ChunkStream, Span, StateFile, aligned_bytes, aligned_empty

WAIT = 10.0


def whole(file: StateFile) -> torch.Tensor:
    buffer = aligned_empty(file.num_bytes)
    file.read(buffer, 0).wait()
    return buffer


def fill(file: StateFile) -> torch.Tensor:
    """Write numbers to a file, and return them."""
    data = aligned_empty(file.num_bytes)
    data.copy_(torch.randint(256, data.shape))
    file.write(data, 0).wait()
    return data


def add_number(number: int, chunk: torch.Tensor) -> None:
    chunk.add_(number + 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    gap=st.integers(0, 2),
    buffers=st.integers(1, 5),
    order=st.randoms(use_true_random=False),
)
def test_a_pass_changes_what_a_pass_over_memory_changes(
    tmp_path: Path, sizes: list[int], gap: int, buffers: int, order: object
) -> None:
    chunks, at = [], 0
    for pages in sizes:
        chunks.append(Chunk(at * PAGE, pages * PAGE))
        at += pages + gap
    order.shuffle(chunks)  # type: ignore[attr-defined]
    with make_file(tmp_path, at * PAGE) as file:
        expected = fill(file)
        stream = ChunkStream(file, chunk_bytes=4 * PAGE, buffers=buffers)
        for _ in range(2):
            report = stream.run(chunks, add_number)
            for number, chunk in enumerate(chunks):
                expected[chunk.offset : chunk.offset + chunk.num_bytes] += number + 1
        assert torch.equal(whole(file), expected)
        assert report.read_bytes == report.written_bytes == sum(sizes) * PAGE


def test_an_optimizer_steps_on_state_in_a_file_as_on_state_in_memory(tmp_path: Path) -> None:
    count, gradient = 5 * PAGE // 4, torch.randn(5 * PAGE // 4)
    memory = torch.zeros(count)
    with make_file(tmp_path, 5 * PAGE) as file:
        stream = ChunkStream(file, chunk_bytes=2 * PAGE)
        chunks = stream.chunks(5 * PAGE)

        def momentum(number: int, chunk: torch.Tensor) -> None:
            values = chunk.view(torch.float32)
            first = chunks[number].offset // 4
            values.mul_(0.9).add_(gradient[first : first + values.numel()])

        for _ in range(3):
            memory.mul_(0.9).add_(gradient)
            stream.run(chunks, momentum)
        assert torch.equal(whole(file).view(torch.float32), memory)


def test_chunks_cover_a_range_without_gaps(tmp_path: Path) -> None:
    with make_file(tmp_path, 64 * PAGE) as file:
        stream = ChunkStream(file, chunk_bytes=4 * PAGE)
        chunks = stream.chunks(10 * PAGE - 5, offset=2 * PAGE)
    assert chunks == [Chunk(2 * PAGE, 4 * PAGE), Chunk(6 * PAGE, 4 * PAGE), Chunk(10 * PAGE, 2 * PAGE)]
    assert stream.chunks(0) == []
    assert stream.buffer_bytes == 3 * 4 * PAGE


def test_nothing_to_do_is_done_at_once(tmp_path: Path) -> None:
    with make_file(tmp_path, PAGE) as file:
        report = ChunkStream(file, chunk_bytes=PAGE).run([], add_number)
        assert (report.read_bytes, report.written_bytes, report.spans) == (0, 0, [])


class Watch:
    """Knows which transfers the system has been asked for."""

    def __init__(self) -> None:
        self.events: dict[tuple[str, int], threading.Event] = {}
        self.lock = threading.Lock()

    def event(self, what: str, page: int) -> threading.Event:
        with self.lock:
            return self.events.setdefault((what, page), threading.Event())

    def __call__(self, what: str, offset: int, num_bytes: int) -> int:
        self.event(what, offset // PAGE).set()
        return num_bytes


def test_while_a_chunk_is_updated_the_next_is_read_and_the_last_is_written(tmp_path: Path) -> None:
    """Each update ends only when it has seen both; without overlap the first would wait for ever."""
    watch, count, seen = Watch(), 6, []

    def update(number: int, chunk: torch.Tensor) -> None:
        if number < count - 1:
            assert watch.event("read", number + 1).wait(WAIT)
        if number:
            assert watch.event("write", number - 1).wait(WAIT)
        assert not watch.event("write", number).is_set()
        seen.append(number)

    with make_file(tmp_path, count * PAGE, face=FaultyFace(watch)) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE)
        report = stream.run(stream.chunks(count * PAGE), update)
    assert seen == list(range(count))
    for number in range(1, count - 1):
        update_span, read, written = (
            only(report.spans, what, chunk)
            for what, chunk in [("update", number), ("read", number + 1), ("write", number - 1)]
        )
        assert read.start_seconds <= update_span.start_seconds < update_span.end_seconds
        assert written.start_seconds <= update_span.start_seconds


def only(spans: list[Span], what: str, chunk: int) -> Span:
    (span,) = [span for span in spans if (span.what, span.chunk) == (what, chunk)]
    return span


def test_no_more_chunks_are_read_than_there_are_buffers(tmp_path: Path) -> None:
    watch = Watch()

    def update(number: int, chunk: torch.Tensor) -> None:
        if number == 0:
            time.sleep(0.1)
            assert watch.event("read", 1).is_set()
            assert not watch.event("read", 2).is_set()

    with make_file(tmp_path, 6 * PAGE, face=FaultyFace(watch)) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE, buffers=3)
        stream.run(stream.chunks(6 * PAGE), update)


def test_time_that_is_not_hidden_is_reported_where_it_was_spent(tmp_path: Path) -> None:
    delay = {"read": 0.0, "write": 0.0}

    def slow(what: str, _offset: int, num_bytes: int) -> int:
        time.sleep(delay[what])
        return num_bytes

    with make_file(tmp_path, 4 * PAGE, face=FaultyFace(slow)) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE)
        chunks = stream.chunks(4 * PAGE)
        delay["read"] = 0.1
        reading = stream.run(chunks, add_number)
        delay.update(read=0.0, write=0.1)
        writing = stream.run(chunks, add_number)
        delay["write"] = 0.0
        updating = stream.run(chunks, lambda number, chunk: time.sleep(0.1))
    assert reading.read_wait_seconds >= 0.2
    assert reading.read_wait_seconds > 2 * reading.write_wait_seconds
    assert writing.write_wait_seconds >= 0.1
    assert writing.write_wait_seconds > 2 * writing.read_wait_seconds
    assert updating.update_seconds >= 0.4
    for report in (reading, writing, updating):
        assert report.update_seconds + report.read_wait_seconds + report.write_wait_seconds <= report.seconds
        assert all(0 <= span.start_seconds <= span.end_seconds <= report.seconds for span in report.spans)
        assert sorted(span.chunk for span in report.spans if span.what == "write") == [0, 1, 2, 3]


def test_a_pass_that_only_reads_changes_nothing(tmp_path: Path) -> None:
    with make_file(tmp_path, 4 * PAGE) as file:
        before, seen = fill(file), []

        def look(number: int, chunk: torch.Tensor) -> None:
            seen.append(chunk.clone())
            chunk.zero_()

        stream = ChunkStream(file, chunk_bytes=PAGE)
        report = stream.run(stream.chunks(4 * PAGE), look, writes=False)
        assert torch.equal(torch.cat(seen), before)
        assert torch.equal(whole(file), before)
        assert report.written_bytes == 0


def test_a_pass_that_only_writes_reads_nothing(tmp_path: Path) -> None:
    face = FaultyFace()
    with make_file(tmp_path, 8 * PAGE, face=face) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE)
        report = stream.run(stream.chunks(8 * PAGE), lambda number, chunk: chunk.fill_(number), reads=False)
        assert {what for what, _ in face.asked} == {"write"}
        assert whole(file)[::PAGE].tolist() == list(range(8))
        assert report.read_bytes == 0


def disk_error(what: str, page: int, code: int) -> FaultyFace:
    def fault(direction: str, offset: int, num_bytes: int) -> int:
        if (direction, offset) == (what, page * PAGE):
            raise error_of(code)
        return num_bytes

    return FaultyFace(fault)


@pytest.mark.parametrize("page", [0, 3, 5])
@pytest.mark.parametrize(("what", "code"), [("read", errno.EIO), ("write", errno.ENOSPC), ("write", errno.EIO)])
def test_an_error_of_the_disk_ends_the_pass_and_leaves_nothing_under_way(
    tmp_path: Path, what: str, code: int, page: int
) -> None:
    face, seen = disk_error(what, page, code), []
    with make_file(tmp_path, 6 * PAGE, face=face) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE)
        with pytest.raises(StorageError, match=errno.errorcode[code]):
            stream.run(stream.chunks(6 * PAGE), lambda number, chunk: seen.append(number))
        asked = len(face.asked)
        assert len(seen) <= page + 3
        time.sleep(0.05)
        assert len(face.asked) == asked
        assert file.traffic.read_bytes + file.traffic.written_bytes < 2 * 6 * PAGE


def test_an_error_of_the_update_is_raised_as_it_is_and_ends_the_pass(tmp_path: Path) -> None:
    face, error = FaultyFace(), ZeroDivisionError("of the user")
    with make_file(tmp_path, 6 * PAGE, face=face) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE)

        def update(number: int, chunk: torch.Tensor) -> None:
            if number == 2:
                raise error

        with pytest.raises(ZeroDivisionError) as caught:
            stream.run(stream.chunks(6 * PAGE), update)
        assert caught.value is error
        assert ("write", 2 * PAGE) not in face.asked
        assert ("read", 4 * PAGE) not in face.asked


def test_after_an_error_blocks_that_have_not_begun_are_left_out(tmp_path: Path) -> None:
    face, begun = FaultyFace(), threading.Event()

    def slow_at_the_second_chunk(what: str, offset: int, num_bytes: int) -> int:
        if offset >= 16 * PAGE:
            begun.set()
            time.sleep(0.02)
        return num_bytes

    def update(number: int, chunk: torch.Tensor) -> None:
        assert begun.wait(WAIT)
        raise ZeroDivisionError

    face.armed = slow_at_the_second_chunk
    with make_file(tmp_path, 32 * PAGE, face=face, threads=1) as file:
        stream = ChunkStream(file, chunk_bytes=16 * PAGE)
        with pytest.raises(ZeroDivisionError):
            stream.run(stream.chunks(32 * PAGE), update)
        assert 16 < len(face.asked) < 32


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("of the file")])
def test_after_a_pass_that_ended_half_way_the_file_is_out_of_use(tmp_path: Path, error: BaseException) -> None:
    with make_file(tmp_path, 4 * PAGE) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE)

        def update(number: int, chunk: torch.Tensor) -> None:
            if number == 1:
                raise error

        with pytest.raises(type(error)):
            stream.run(stream.chunks(4 * PAGE), update)
        for writes in (True, False):
            with pytest.raises(StorageError, match="ended half-way, and left chunks of two steps"):
                stream.run(stream.chunks(4 * PAGE), add_number, writes=writes)


def test_after_a_pass_that_only_read_and_failed_the_file_is_as_it_was(tmp_path: Path) -> None:
    with make_file(tmp_path, 4 * PAGE) as file:
        before, stream = fill(file), ChunkStream(file, chunk_bytes=PAGE)

        def update(number: int, chunk: torch.Tensor) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            stream.run(stream.chunks(4 * PAGE), update, writes=False)
        stream.run(stream.chunks(4 * PAGE), add_number)
        assert torch.equal(whole(file)[:PAGE], before[:PAGE] + 1)


def test_a_file_that_is_cut_in_the_middle_of_a_pass_is_an_error(tmp_path: Path) -> None:
    with make_file(tmp_path, 16 * PAGE) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE)

        def update(number: int, chunk: torch.Tensor) -> None:
            if number == 5:
                cut(file, 3 * PAGE)

        with pytest.raises(StorageError, match=f"cut from {16 * PAGE} to {3 * PAGE} bytes by somebody else"):
            stream.run(stream.chunks(16 * PAGE), update)


def test_a_stuck_disk_ends_the_pass_after_the_timeout(tmp_path: Path) -> None:
    go = threading.Event()

    def stuck(what: str, offset: int, num_bytes: int) -> int:
        if (what, offset) == ("write", PAGE):
            go.wait()
        return num_bytes

    file = make_file(tmp_path, 6 * PAGE, face=FaultyFace(stuck), timeout_seconds=0.3)
    stream = ChunkStream(file, chunk_bytes=PAGE)
    start = time.perf_counter()
    with pytest.raises(StorageError, match=f"Writing {PAGE} bytes at offset {PAGE} .* has not ended after"):
        stream.run(stream.chunks(6 * PAGE), add_number)
    with pytest.raises(StorageError, match="a transfer of an earlier pass is stuck"):
        stream.run(stream.chunks(6 * PAGE), add_number)
    file.close()
    assert time.perf_counter() - start < 5
    go.set()


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([Chunk(0, 4 * PAGE)], f"have at most {2 * PAGE} bytes"),
        ([Chunk(0, 0)], "cannot be passed through"),
        ([Chunk(100, PAGE)], f"begin and end at multiples of {PAGE}"),
        ([Chunk(0, 100)], f"begin and end at multiples of {PAGE}"),
        ([Chunk(PAGE, PAGE), Chunk(0, 2 * PAGE)], f"do not overlap .the one before ends at {2 * PAGE}"),
        ([Chunk(-PAGE, PAGE)], "cannot be passed through"),
        ([Chunk(3 * PAGE, 2 * PAGE)], f"Chunks end at {5 * PAGE}, behind the end of a file of {4 * PAGE} bytes"),
    ],
)
def test_chunks_that_do_not_fit_are_refused_before_anything_moves(
    tmp_path: Path, chunks: list[Chunk], words: str
) -> None:
    face = FaultyFace()
    with make_file(tmp_path, 4 * PAGE, face=face) as file:
        with pytest.raises(ConfigError, match=words):
            ChunkStream(file, chunk_bytes=2 * PAGE).run(chunks, add_number)
        assert face.asked == []
        whole(file)


@pytest.mark.parametrize("options", [{"chunk_bytes": 0}, {"buffers": 0}])
def test_a_stream_without_memory_is_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with make_file(tmp_path, PAGE) as file, pytest.raises(ConfigError, match="are to be positive"):
        ChunkStream(file, **options)


def test_no_thread_is_left_after_passes_and_errors(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    updates: list[Callable[[int, torch.Tensor], object]] = [add_number, lambda number, chunk: 1 / 0]
    for update in updates:
        with make_file(tmp_path, 4 * PAGE) as file:
            stream = ChunkStream(file, chunk_bytes=PAGE)
            if update is add_number:
                stream.run(stream.chunks(4 * PAGE), update)
                continue
            with pytest.raises(ZeroDivisionError):
                stream.run(stream.chunks(4 * PAGE), update)
    assert set(threading.enumerate()) == before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    passes=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12), st.booleans()), min_size=2, max_size=6),
    buffers=st.integers(1, 5),
)
def test_passes_that_read_ahead_for_each_other_change_what_passes_over_memory_change(
    tmp_path: Path, passes: list[tuple[int, int, bool]], buffers: int
) -> None:
    """Whatever overlaps whatever, and whether or not what was announced is what comes."""
    runs = [[Chunk(page * PAGE, PAGE) for page in range(first, min(12, first + count))] for first, count, _ in passes]
    with make_file(tmp_path, 12 * PAGE) as file:
        expected, stream = fill(file), ChunkStream(file, chunk_bytes=PAGE, buffers=buffers)
        for number, chunks in enumerate(runs):
            announced = runs[number + 1] if number + 1 < len(runs) else []
            stream.run(chunks, add_number, then=announced if passes[number][2] else announced[1:])
            for place, chunk in enumerate(chunks):
                expected[chunk.offset : chunk.offset + PAGE] += place + 1
        stream.finish()
        assert torch.equal(whole(file), expected)


def test_what_the_next_pass_begins_with_is_read_while_this_one_ends_and_the_last_write_is_not_waited_for(
    tmp_path: Path,
) -> None:
    watch, go = Watch(), threading.Event()

    def holds_the_last_write(what: str, offset: int, num_bytes: int) -> int:
        if (what, offset) == ("write", PAGE):
            assert go.wait(WAIT)
        return watch(what, offset, num_bytes)

    with make_file(tmp_path, 8 * PAGE, face=FaultyFace(holds_the_last_write)) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE)
        chunks = stream.chunks(8 * PAGE)

        def update(number: int, chunk: torch.Tensor) -> None:
            if number == 1:
                assert watch.event("read", 2).wait(WAIT)

        stream.run(chunks[:2], update, then=chunks[2:4])
        go.set()
        report = stream.run(chunks[2:4], add_number)
    assert only(report.spans, "read", 0).start_seconds < 0
    earlier = [span for span in report.spans if (span.what, span.chunk) == ("write", -1)]
    assert len(earlier) == 2
    assert all(span.start_seconds < 0 for span in earlier)
    assert report.read_bytes == 2 * PAGE
    assert report.written_bytes == 4 * PAGE


def test_a_pass_over_the_same_chunks_begins_with_one_that_was_read_ahead(tmp_path: Path) -> None:
    with make_file(tmp_path, 6 * PAGE) as file:
        expected, stream = fill(file), ChunkStream(file, chunk_bytes=PAGE)
        chunks = stream.chunks(6 * PAGE)
        for number in range(3):
            report = stream.run(chunks, lambda number, chunk: chunk.add_(1), then=chunks)
            assert number == 0 or only(report.spans, "read", 0).start_seconds < 0
        stream.finish()
        assert torch.equal(whole(file), expected + 3)


def test_a_chunk_that_is_still_written_is_read_afterwards(tmp_path: Path) -> None:
    slow = FaultyFace(lambda what, offset, size: (time.sleep(0.05) if what == "write" else None) or size)
    with make_file(tmp_path, 2 * PAGE, face=slow) as file:
        stream = ChunkStream(file, chunk_bytes=PAGE)
        chunks = stream.chunks(2 * PAGE)
        for _ in range(3):
            stream.run(chunks, lambda number, chunk: chunk.add_(1), then=chunks)
        stream.finish()
        assert whole(file).eq(3).all()


def test_a_write_that_fails_after_its_pass_is_raised_by_what_comes_next(tmp_path: Path) -> None:
    for finishes in (True, False):
        with make_file(tmp_path, 4 * PAGE, face=disk_error("write", 1, errno.ENOSPC)) as file:
            stream = ChunkStream(file, chunk_bytes=PAGE)
            chunks = stream.chunks(4 * PAGE)
            stream.run(chunks[:2], add_number, then=chunks[2:])
            with pytest.raises(StorageError, match="ENOSPC"):
                stream.finish() if finishes else stream.run(chunks[2:], add_number)
            with pytest.raises(StorageError, match="out of use"):
                stream.run(chunks, add_number)


def test_a_chunk_of_one_byte_takes_a_page(tmp_path: Path) -> None:
    with make_file(tmp_path, PAGE) as file:
        assert ChunkStream(file, chunk_bytes=1).chunk_bytes == aligned_bytes(1) == PAGE
