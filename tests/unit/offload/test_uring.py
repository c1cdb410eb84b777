"""What io_uring moves is what system calls move, errors included."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from tests.unit.offload.faulty import PAGE, cut

from meshbolt.errors import ConfigError, StorageError
from meshbolt.offload import StateFile, aligned_empty
from meshbolt.offload import files as files_module
from meshbolt.offload.uring import Block, Ring, find_library

needs_rings = pytest.mark.skipif(
    find_library() is None, reason="needs the package liburing and a system that allows it"
)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StateFile]:
    with StateFile(tmp_path, 256 * PAGE, block_bytes=4 * PAGE, engine="io_uring", timeout_seconds=20.0) as made:
        assert made.engine == "io_uring"
        yield made


def random_bytes(pages: int, seed: int) -> torch.Tensor:
    return aligned_empty(pages * PAGE).random_(0, 255, generator=torch.Generator().manual_seed(seed))


@needs_rings
def test_many_transfers_at_once_arrive_where_they_belong(file: StateFile) -> None:
    runs = [random_bytes(16, seed) for seed in range(16)]
    for request in [file.write(run, number * 16 * PAGE) for number, run in enumerate(runs)]:
        request.wait()
    back = [aligned_empty(16 * PAGE) for _ in runs]
    for request in [file.read(run, number * 16 * PAGE) for number, run in enumerate(back)]:
        request.wait()
    assert all(torch.equal(*pair) for pair in zip(runs, back, strict=True))
    assert file.traffic.read_bytes == file.traffic.written_bytes == 256 * PAGE


@needs_rings
def test_others_run_while_it_waits(file: StateFile) -> None:
    counted, over = [0], threading.Event()

    def count() -> None:
        while not over.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    for _ in range(20):
        file.write(random_bytes(64, 1), 0).wait()
    over.set()
    thread.join()
    assert counted[0] > 1000


@needs_rings
def test_a_file_that_was_cut_is_an_error_and_out_of_use(file: StateFile) -> None:
    cut(file, 8 * PAGE)
    with pytest.raises(StorageError, match="was cut from"):
        file.write(random_bytes(4, 1), 0).wait()
    with pytest.raises(StorageError, match="out of use"):
        file.read(aligned_empty(PAGE), 0)


@needs_rings
def test_what_is_abandoned_ends(file: StateFile) -> None:
    request = file.write(random_bytes(256, 1), 0)
    request.abandon()
    assert request.settle()


@needs_rings
def test_an_error_of_the_system_is_told_to_the_block() -> None:
    told: list[BaseException | None] = []

    def steps() -> Generator[tuple[memoryview, int], int, None]:
        try:
            yield memoryview(bytearray(PAGE)), 0
        except OSError as error:
            raise StorageError(f"told: {error.errno}") from error

    ring = Ring(find_library(), depth=2, name="test")  # type: ignore[arg-type]
    over = threading.Event()
    ring.submit(Block("read", 10**6, steps(), lambda error: (told.append(error), over.set())))  # type: ignore[arg-type, func-returns-value]
    assert over.wait(5.0)
    assert ring.close(5.0)
    assert str(told[0]) == "told: 9"


@needs_rings
def test_short_transfers_are_gone_on_with(tmp_path: Path) -> None:
    target = tmp_path / "some"
    target.write_bytes(bytes(range(256)) * 32)
    fd, seen, over = os.open(target, os.O_RDONLY), [], threading.Event()
    into = memoryview(bytearray(3 * PAGE))

    def steps() -> Generator[tuple[memoryview, int], int, None]:
        seen.append((yield into, 0))  # the file has two pages
        seen.append((yield into[2 * PAGE :], 2 * PAGE))

    ring = Ring(find_library(), depth=1, name="test")  # type: ignore[arg-type]
    ring.submit(Block("read", fd, steps(), lambda _: over.set()))
    assert over.wait(5.0)
    ring.close(5.0)
    os.close(fd)
    assert seen == [2 * PAGE, 0]
    assert bytes(into[: 2 * PAGE]) == target.read_bytes()


def test_it_is_refused_where_it_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "find_library", lambda: None)
    with pytest.raises(ConfigError, match="needs the package liburing"):
        StateFile(tmp_path, PAGE, engine="io_uring")
    with StateFile(tmp_path, PAGE) as file:
        assert file.engine == "threads"
