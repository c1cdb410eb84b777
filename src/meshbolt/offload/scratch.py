"""Make the file that holds state while a run lasts, and know the disk under it.

The file has a name for an instant only: it is created empty, its name is removed, and then its space is reserved. So it
ends with the process however that ends, no later run can take it for its own, and nobody can remove or truncate it by
name. Its space is in use all the same: `df` counts it, `du` does not, `lsof +L1` lists it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from meshbolt.errors import StorageError
from meshbolt.offload.buffers import ALIGNMENT_BYTES, aligned_empty, bytes_of
from meshbolt.offload.faces import SystemFace
from meshbolt.units import format_bytes

# File systems that are memory by another name.
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
_NOT_OFFERED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_ADVICE = {
    errno.ENOSPC: "Free space there, or give a path on another disk.",
    errno.EDQUOT: "The quota of this user is used up: free space, or give a path on another disk.",
    errno.EFBIG: "The process may not write files as large as this (`ulimit -f`), or the file system has none.",
    errno.EIO: "The disk may be failing: see the kernel's log (`dmesg`).",
    errno.EROFS: "Give a path that this process may write to.",
    errno.EACCES: "Give a path that this process may write to.",
}


@dataclass(frozen=True)
class Disk:
    """What lies under a folder.

    Attributes:
        folder: the absolute path that was asked for.
        filesystem: its type, such as "ext4"; "unknown" where the system does not tell.
        free_bytes: that this user may take, as all ranks of the machine see them: they share them.
        total_bytes: of the whole file system.
    """

    folder: str
    filesystem: str
    free_bytes: int
    total_bytes: int

    @property
    def in_memory(self) -> bool:
        """Whether files there take host memory, and no disk."""
        return self.filesystem in IN_MEMORY


@dataclass(frozen=True)
class Scratch:
    """A file that is open, reserved and nameless.

    Attributes:
        fd: open for reading and writing, with O_DIRECT where `direct`.
        path: the name it had for an instant, for messages.
        num_bytes: its length, all of it reserved.
        direct: whether transfers go past the page cache.
        disk: what it lies on, as it was before.
    """

    fd: int
    path: str
    num_bytes: int
    direct: bool
    disk: Disk


def disk_of(folder: str | os.PathLike[str]) -> Disk:
    """Return what lies under a folder, which is created where only its last part is missing.

    Raises:
        StorageError: it does not exist and its parent does not either, or it is no folder, or it may not be looked at.
    """
    path = Path(folder).expanduser().absolute()
    if path.is_file():
        raise StorageError(
            f"The folder {str(path)!r} cannot be used for the state of a run: it is a file. Give a directory."
        )
    try:
        path.mkdir(exist_ok=True)  # a parent that is missing is a disk that is not mounted, more often than a wish
        room = os.statvfs(path)
    except OSError as error:
        raise failure(f"The folder {str(path)!r} cannot be used for the state of a run", error) from error
    return Disk(str(path), _filesystem(path), room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize)


def make_scratch(folder: str | os.PathLike[str], num_bytes: int, *, name: str, face: SystemFace) -> Scratch:
    """Make a nameless file with all of its space reserved.

    Args:
        folder: on the disk to use.
        num_bytes: in whole units of alignment.
        name: what its name begins with while it has one.
        face: what asks the operating system.

    Raises:
        StorageError: there is no room for it, or the system refuses; nothing is left behind.
    """
    disk = disk_of(folder)
    _require_room(disk, num_bytes)
    path = Path(disk.folder) / f"{name}-{secrets.token_hex(4)}"
    fd = _open_nameless(path)
    try:
        direct = _pass_page_cache(fd, face)
        face.allocate(fd, num_bytes)
        _require_reserved(fd, path, num_bytes)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, StorageError) or not isinstance(error, OSError):
            raise
        raise failure(f"{format_bytes(num_bytes)} cannot be reserved in {disk.folder!r}", error) from error
    return Scratch(fd, str(path), num_bytes, direct, disk)


def grow_scratch(scratch: Scratch, num_bytes: int, *, face: SystemFace) -> Scratch:
    """Reserve more space for a file, behind what it has.

    Args:
        scratch: the file.
        num_bytes: its new length, in whole units of alignment; less than now changes nothing.
        face: what asks the operating system.

    Raises:
        StorageError: there is no room for it, or the system refuses; the file is as it was.
    """
    more = num_bytes - scratch.num_bytes
    if more <= 0:
        return scratch
    _require_room(disk_of(scratch.disk.folder), more)
    try:
        face.allocate(scratch.fd, num_bytes)
        _require_reserved(scratch.fd, Path(scratch.path), num_bytes)
    except BaseException as error:
        os.ftruncate(scratch.fd, scratch.num_bytes)
        if isinstance(error, StorageError) or not isinstance(error, OSError):
            raise
        raise failure(f"{format_bytes(more)} more cannot be reserved in {scratch.disk.folder!r}", error) from error
    return replace(scratch, num_bytes=num_bytes)


def failure(what: str, error: OSError) -> StorageError:
    """Return the error that says what could not be done, what the system answered, and what may help.

    Args:
        what: the beginning of the message: a sentence without its stop.
        error: the system's answer.
    """
    code = errno.errorcode.get(error.errno or 0, "no error number")
    advice = _ADVICE.get(error.errno or 0, "")
    return StorageError(f"{what}: {error.strerror or error} ({code}). {advice}".rstrip())


def _require_room(disk: Disk, num_bytes: int) -> None:
    if num_bytes > disk.free_bytes:
        raise StorageError(
            f"{num_bytes} bytes ({format_bytes(num_bytes)}) are needed in {disk.folder!r}, and this user may take "
            f"{disk.free_bytes} ({format_bytes(disk.free_bytes)}) of the {format_bytes(disk.total_bytes)} of its "
            f"{disk.filesystem} file system. {_ADVICE[errno.ENOSPC]}"
        )


def _open_nameless(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise failure(f"No file can be made in {str(path.parent)!r}", error) from error
    try:
        path.unlink()
    except OSError as error:
        os.close(fd)
        raise failure(f"The name of {str(path)!r} cannot be removed", error) from error
    return fd


def _pass_page_cache(fd: int, face: SystemFace) -> bool:
    """Ask for O_DIRECT and try it on one page, written and read; return False with the flag taken back if it is not offered."""
    flags, works = fcntl.fcntl(fd, fcntl.F_GETFL), False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        page, again = (bytes_of(aligned_empty(ALIGNMENT_BYTES)) for _ in range(2))
        page[:] = bytes(range(256)) * (ALIGNMENT_BYTES // 256)
        works = face.write(fd, page, 0) == face.read(fd, again, 0) == ALIGNMENT_BYTES and page == again
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    os.ftruncate(fd, 0)  # so that what is reserved next reads as zeros
    if not works:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return works


def _require_reserved(fd: int, path: Path, num_bytes: int) -> None:
    found = os.fstat(fd)
    if found.st_size < num_bytes or found.st_blocks * 512 < num_bytes:
        raise StorageError(
            f"{num_bytes} bytes were asked for in {str(path.parent)!r}, and its file system gave a file of {found.st_size} "
            f"bytes with only {found.st_blocks * 512} behind it: it could be full in the middle of the run. Give a path on a "
            "file system that reserves space (ext4, xfs)."
        )


def _filesystem(path: Path) -> str:
    """Return the type of the file system at a path, by the longest mount point above it."""
    best, found = "", "unknown"
    real = os.path.realpath(path)
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, after = line.split(" - ", 1)
            point = before.split()[4].encode().decode("unicode_escape")
            inside = point == "/" or real == point or real.startswith(point + "/")
            if inside and len(point) >= len(best):
                best, found = point, after.split()[0]
    return found
