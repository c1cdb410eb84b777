"""If these fail, a disk that fails is silent, hangs the run, or gives state that nobody wrote."""

from __future__ import annotations

import errno
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from tests.unit.offload.faulty import PAGE, FaultyFace, cut, error_of, make_file

from meshbolt.errors import StorageError
from meshbolt.offload import aligned_empty


def failing(code: int, *, what: str, at: int) -> FaultyFace:
    def fault(direction: str, offset: int, num_bytes: int) -> int:
        if direction == what and offset == at:
            raise error_of(code)
        return num_bytes

    return FaultyFace(fault)


@pytest.mark.parametrize(
    ("what", "code", "advice"),
    [
        ("write", errno.ENOSPC, "No space left on device (ENOSPC). Free space there, or give a path on another disk."),
        ("write", errno.EDQUOT, "The quota of this user is used up"),
        ("write", errno.EIO, "Input/output error (EIO). The disk may be failing: see the kernel's log (`dmesg`)."),
        ("read", errno.EIO, "Input/output error (EIO). The disk may be failing: see the kernel's log (`dmesg`)."),
        ("read", errno.ESTALE, "(ESTALE)."),
    ],
)
def test_an_error_says_what_was_moved_where_and_what_the_system_answered(
    tmp_path: Path, what: str, code: int, advice: str
) -> None:
    with make_file(tmp_path, 8 * PAGE, face=failing(code, what=what, at=3 * PAGE), name="rank-1") as file:
        begin = file.write if what == "write" else file.read
        with pytest.raises(StorageError) as caught:
            begin(aligned_empty(8 * PAGE), 0).wait()
    message = str(caught.value)
    doing = "Writing" if what == "write" else "Reading"
    assert message.startswith(f"{doing} {PAGE} bytes at offset {3 * PAGE} of '{tmp_path}/rank-1-")
    assert advice in message
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == code


def test_after_an_error_the_other_blocks_are_left_out_and_the_buffer_is_free(tmp_path: Path) -> None:
    face = failing(errno.EIO, what="read", at=0)
    with make_file(tmp_path, 64 * PAGE, face=face, threads=1) as file:
        request = file.read(aligned_empty(64 * PAGE), 0)
        with pytest.raises(StorageError, match="EIO"):
            request.wait()
        assert request.done
        assert face.asked == [("read", 0)]


def test_after_a_failed_read_the_file_is_still_good(tmp_path: Path) -> None:
    with make_file(tmp_path, 2 * PAGE, face=failing(errno.EIO, what="read", at=0)) as file:
        with pytest.raises(StorageError):
            file.read(aligned_empty(PAGE), 0).wait()
        file.read(aligned_empty(PAGE), PAGE).wait()


def test_a_failed_write_that_nobody_waited_for_is_raised_by_the_next_request(tmp_path: Path) -> None:
    with make_file(tmp_path, 2 * PAGE, face=failing(errno.ENOSPC, what="write", at=0)) as file:
        request = file.write(aligned_empty(PAGE), 0)
        assert request.settle()
        for begin in (file.read, file.write):
            with pytest.raises(StorageError, match=r"the file is out of use\. Writing 4096 bytes at offset 0 .*ENOSPC"):
                begin(aligned_empty(PAGE), PAGE)


@pytest.mark.parametrize("what", ["read", "write"])
def test_short_transfers_are_continued(tmp_path: Path, what: str) -> None:
    face = FaultyFace(lambda direction, offset, size: PAGE if direction == what else size)
    with make_file(tmp_path, 8 * PAGE, face=face, block_bytes=8 * PAGE) as file:
        data, back = aligned_empty(8 * PAGE), aligned_empty(8 * PAGE)
        data.copy_(torch.randint(256, data.shape))
        file.write(data, 0).wait()
        file.read(back, 0).wait()
        assert torch.equal(data, back)
        assert [offset for direction, offset in face.asked if direction == what] == [n * PAGE for n in range(8)]
        assert file.traffic.written_bytes == file.traffic.read_bytes == 8 * PAGE


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_transfer_that_ends_within_a_page_goes_on_at_its_beginning(tmp_path: Path, what: str) -> None:
    face = FaultyFace(lambda direction, offset, size: 2 * PAGE + 100 if (direction, offset) == (what, 0) else size)
    with make_file(tmp_path, 4 * PAGE, face=face, block_bytes=4 * PAGE) as file:
        file.write(aligned_empty(4 * PAGE).fill_(4), 0).wait()
        back = aligned_empty(4 * PAGE)
        file.read(back, 0).wait()
        assert back.eq(4).all()
        assert [offset for direction, offset in face.asked if direction == what] == [0, 2 * PAGE]


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_system_that_moves_nothing_is_an_error_and_no_endless_loop(tmp_path: Path, what: str) -> None:
    face = FaultyFace(lambda direction, offset, size: 0)
    with make_file(tmp_path, PAGE, face=face) as file:
        begin = file.write if what == "write" else file.read
        with pytest.raises(StorageError, match="the system moves no more of them and gives no reason"):
            begin(aligned_empty(PAGE), 0).wait()


@pytest.mark.parametrize("what", ["read", "write"])
@pytest.mark.parametrize("to_pages", [0, 3])
def test_a_file_that_was_cut_short_is_an_error_for_any_part_of_it(tmp_path: Path, what: str, to_pages: int) -> None:
    with make_file(tmp_path, 8 * PAGE) as file:
        file.write(aligned_empty(8 * PAGE).fill_(1), 0).wait()
        cut(file, to_pages * PAGE)
        begin = file.write if what == "write" else file.read
        for page in (0, 7):  # the last one would make the file grow again, with zeros before it
            with pytest.raises(StorageError, match=f"cut from {8 * PAGE} to {to_pages * PAGE} bytes|out of use"):
                begin(aligned_empty(PAGE), page * PAGE).wait()


def test_a_limit_that_is_reached_in_the_middle_of_a_block_is_an_error(tmp_path: Path) -> None:
    """The system really writes a part, and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with make_file(tmp_path, 8 * PAGE, block_bytes=8 * PAGE) as file:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE, hard))
            with pytest.raises(StorageError, match=rf"Writing {5 * PAGE} bytes at offset {3 * PAGE} .*EFBIG"):
                file.write(aligned_empty(8 * PAGE), 0).wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_slow_disk_is_slow_and_no_error(tmp_path: Path) -> None:
    face = FaultyFace(lambda direction, offset, size: time.sleep(0.05) or size)
    with make_file(tmp_path, 4 * PAGE, face=face, threads=1) as file:
        start = time.perf_counter()
        file.write(aligned_empty(4 * PAGE), 0).wait()
        assert time.perf_counter() - start >= 0.2


def test_a_disk_that_does_not_answer_is_an_error_after_the_timeout_and_holds_nobody_up(tmp_path: Path) -> None:
    go, said = threading.Event(), []

    def stuck(_what: str, _offset: int, num_bytes: int) -> int:
        go.wait()
        return num_bytes

    file = make_file(tmp_path, 2 * PAGE, face=FaultyFace(stuck), threads=1, timeout_seconds=0.2, say=said.append)
    said.clear()
    request = file.read(aligned_empty(2 * PAGE), 0)
    with pytest.raises(StorageError, match=r"Reading 8192 bytes at offset 0 .* has not ended after 200\.0 ms"):
        request.wait()
    assert not request.done
    start = time.perf_counter()
    file.close()
    assert time.perf_counter() - start < 5
    assert len(said) == 1
    assert "could not be closed" in said[0]
    go.set()  # it answers at last: the thread ends, and no other file has got the number of its descriptor
    request.wait()


def test_a_defect_in_a_thread_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    def defect(_what: str, _offset: int, num_bytes: int) -> int:
        raise KeyError("no such thing")

    with (
        make_file(tmp_path, PAGE, face=FaultyFace(defect)) as file,
        pytest.raises(StorageError, match="KeyError") as caught,
    ):
        file.read(aligned_empty(PAGE), 0).wait()
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_file_taken_out_of_use_gives_the_first_reason(tmp_path: Path) -> None:
    with make_file(tmp_path, PAGE) as file:
        file.condemn("The first reason.")
        file.condemn("The second one.")
        with pytest.raises(StorageError, match=r"The first reason\.$"):
            file.read(aligned_empty(PAGE), 0)
