"""If these fail, a run begins without the room it needs, or leaves a file behind that another one could take for its own."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.unit.offload.faulty import PAGE, FaultyFace, error_of, make_file

from meshbolt.errors import StorageError
from meshbolt.offload import StateFile, SystemCalls, aligned_empty, disk_of
from meshbolt.testing import RankFailure, run_ranks

MIB = 2**20


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """A limit of this process that the system enforces."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 16 * PAGE
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_has_no_name_and_all_of_its_space(tmp_path: Path) -> None:
    with make_file(tmp_path, 3 * MIB, name="run-7-rank-0") as file:
        assert list(tmp_path.iterdir()) == []
        found = os.fstat(file._scratch.fd)
        assert found.st_size == file.num_bytes == 3 * MIB
        assert found.st_blocks * 512 >= 3 * MIB
        assert found.st_mode & 0o777 == 0o600
        assert "run-7-rank-0" in file.path


def test_what_was_not_written_reads_as_zeros(tmp_path: Path) -> None:
    with make_file(tmp_path, 8 * PAGE) as file:
        buffer = aligned_empty(8 * PAGE).fill_(1)
        file.read(buffer, 0).wait()
        assert not buffer.any()


def test_the_last_part_of_a_folder_is_created_and_no_more(tmp_path: Path) -> None:
    make_file(tmp_path / "new", PAGE).close()
    assert (tmp_path / "new").is_dir()
    with pytest.raises(StorageError, match=r"no/disk.* cannot be used .*ENOENT"):
        make_file(tmp_path / "no" / "disk", PAGE)
    assert not (tmp_path / "no").exists()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be used for the state of a run: it is a file"):
        make_file(tmp_path / "file", PAGE)


def test_a_disk_without_room_is_refused_with_both_numbers(tmp_path: Path) -> None:
    disk = disk_of(tmp_path)
    with pytest.raises(
        StorageError, match=rf"{2**60} bytes .* are needed in .*{tmp_path}.* this user may take \d+ "
    ) as caught:
        make_file(tmp_path, 2**60)
    assert disk.filesystem in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_room_that_another_takes_meanwhile_is_missed_when_the_space_is_reserved(small_disk: Path) -> None:
    class Crowded(SystemCalls):
        def allocate(self, fd: int, num_bytes: int) -> None:
            (small_disk / "other").write_bytes(b"x" * 3 * MIB)
            super().allocate(fd, num_bytes)

    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(
        StorageError, match=r"2\.0 MiB cannot be reserved in .*: No space left on device \(ENOSPC\)\. Free space"
    ):
        make_file(small_disk, 2 * MIB, face=Crowded())
    (small_disk / "other").unlink()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    make_file(small_disk, 3 * MIB).close()  # so nothing of the first one is left


def test_a_file_without_space_behind_it_is_refused(tmp_path: Path) -> None:
    class Sparse(SystemCalls):
        def allocate(self, fd: int, num_bytes: int) -> None:
            os.ftruncate(fd, num_bytes)

    with pytest.raises(
        StorageError, match=r"a file of 65536 bytes with only \d+ behind it: it could be full in the middle"
    ):
        make_file(tmp_path, 16 * PAGE, face=Sparse())


def test_a_limit_of_the_process_is_an_error_that_names_it(tmp_path: Path, file_size_limit: int) -> None:
    with pytest.raises(StorageError, match=r"cannot be reserved in .*: File too large \(EFBIG\)\. .*`ulimit -f`"):
        make_file(tmp_path, file_size_limit + PAGE)
    make_file(tmp_path, file_size_limit).close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_system_that_refuses_to_reserve_is_quoted(tmp_path: Path, code: int) -> None:
    class Refusing(SystemCalls):
        def allocate(self, fd: int, num_bytes: int) -> None:
            raise error_of(code)

    with pytest.raises(StorageError, match=errno.errorcode[code]) as caught:
        make_file(tmp_path, PAGE, face=Refusing())
    assert isinstance(caught.value.__cause__, OSError)


def test_without_direct_io_the_page_cache_is_used_and_that_is_said_once(tmp_path: Path) -> None:
    def refuses_direct(what: str, _offset: int, num_bytes: int) -> int:
        raise error_of(errno.EINVAL)

    said: list[str] = []
    face = FaultyFace()
    face.fault, face.armed = refuses_direct, face.fault
    with make_file(tmp_path, 16 * PAGE, face=face, say=said.append) as file:
        assert not file.direct
        data, back = aligned_empty(16 * PAGE), aligned_empty(16 * PAGE)
        data.copy_(torch.randint(256, data.shape))
        file.write(data, 0).wait()
        file.read(back, 0).wait()
        assert torch.equal(data, back)
    assert len(said) == 1
    assert ("is host memory" if file.disk.in_memory else "has no direct I/O") in said[0]
    assert str(tmp_path) in said[0]


def test_a_disk_that_fails_at_the_first_trial_is_no_lack_of_direct_io(tmp_path: Path) -> None:
    face = FaultyFace()

    def broken(what: str, _offset: int, num_bytes: int) -> int:
        raise error_of(errno.EIO)

    face.fault = broken
    with pytest.raises(StorageError, match=r"cannot be reserved in .*EIO.*dmesg"):
        make_file(tmp_path, PAGE, face=face)


def test_memory_that_looks_like_a_disk_is_said_once_and_works(small_disk: Path) -> None:
    said: list[str] = []
    with make_file(small_disk, 16 * PAGE, say=said.append) as file:
        assert file.disk.in_memory
        assert file.disk.filesystem == "tmpfs"
        buffer = aligned_empty(16 * PAGE).fill_(5)
        file.write(buffer, 0).wait()
        buffer.zero_()
        file.read(buffer, 0).wait()
        assert buffer.eq(5).all()
    assert len(said) == 1
    assert "is host memory: what is put there saves none" in said[0]


def test_by_default_it_is_said_as_a_warning(small_disk: Path) -> None:
    with pytest.warns(UserWarning, match="tmpfs, which is host memory"):
        StateFile(small_disk, PAGE).close()


def fill_and_die(folder: Path) -> None:
    file = make_file(folder, 64 * MIB, block_bytes=MIB)
    for _ in range(2):
        file.write(aligned_empty(64 * MIB).fill_(1), 0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(fill_and_die, 2, tmp_path)
    assert list(tmp_path.iterdir()) == []
