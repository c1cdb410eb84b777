"""How fast a disk is for state that is offloaded to it, measured with the engine that offloading uses."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meshbolt.cli.doctor.rows import Row, Status
from meshbolt.errors import StorageError
from meshbolt.units import GIB, MIB, format_bytes

_FILE_BYTES = 512 * MIB
_CHUNK_BYTES = 16 * MIB
_IN_FLIGHT = 3
_SECONDS = 2.0
# Below it an update waits for the disk most of the time, whatever else is done.
_SLOW_BYTES_PER_SECOND = 500 * MIB


def disk_rows(path: str | None, *, file_bytes: int = _FILE_BYTES, seconds: float = _SECONDS) -> list[Row]:
    """Write and read a nameless file in a folder, which is gone afterwards.

    Args:
        path: the folder; None: this one, about which nothing is red.
        file_bytes: of the file, less where there is little room.
        seconds: the longest time for each of writing and reading, about.
    """
    from meshbolt.offload import disk_of

    folder = Path("." if path is None else path).absolute()
    if not folder.is_dir():
        return [_no_folder(folder)]
    try:
        disk = disk_of(folder)
        room = min(file_bytes, disk.free_bytes // 4 // _CHUNK_BYTES * _CHUNK_BYTES)
        if room < _CHUNK_BYTES:
            raise StorageError(f"{format_bytes(disk.free_bytes)} are free in {folder}")
        return _measured(folder, disk, room, seconds)
    except StorageError as error:
        status: Status = "yellow" if path is None else "red"
        mend = f"df -h {folder}; ls -ld {folder}   # then give --path of a folder with room that this user may write to"
        return [_row("folder", status, str(error), mend)]


def _no_folder(folder: Path) -> Row:
    if folder.exists():
        return _row("folder", "red", f"{folder} is a file, not a folder", f"meshbolt doctor --path {folder.parent}")
    return _row("folder", "red", f"there is no folder {folder}", f"mkdir -p {folder}   # or give --path of another one")


def _measured(folder: Path, disk: Any, num_bytes: int, seconds: float) -> list[Row]:
    from meshbolt.offload import StateFile

    is_low = disk.free_bytes < 10 * GIB
    where = _row(
        "folder",
        "yellow" if is_low or disk.in_memory else "green",
        f"{folder} on {disk.filesystem}, {format_bytes(disk.free_bytes)} of {format_bytes(disk.total_bytes)} free"
        + (": host memory, where offloaded state saves none" if disk.in_memory else ""),
        "meshbolt doctor --path /path/on/a/disk" if disk.in_memory else f"du -xsh {folder}/*" if is_low else "",
        free_bytes=disk.free_bytes,
    )
    with StateFile(folder, num_bytes, name="meshbolt-doctor", timeout_seconds=60.0, say=_say_nothing) as file:
        written, write_seconds = _move(file.write, num_bytes, seconds)
        read, read_seconds = _move(file.read, written, seconds)
        direct = file.direct
    return [where, _direct_row(direct, disk), *_speed_rows(written / write_seconds, read / read_seconds, direct=direct)]


def _say_nothing(_: str) -> None:
    """Rows say it."""


def _move(begin: Callable[..., Any], num_bytes: int, seconds: float) -> tuple[int, float]:
    """Move a file in chunks, several at once, until it or the time is over; return the bytes and the seconds."""
    from meshbolt.offload import aligned_empty

    free, under_way, moved = deque(aligned_empty(_CHUNK_BYTES).fill_(1) for _ in range(_IN_FLIGHT)), deque[Any](), 0
    start = time.monotonic()
    while moved < num_bytes and (time.monotonic() - start < seconds or not moved):
        if not free:
            request, buffer = under_way.popleft()
            request.wait()
            free.append(buffer)
        buffer = free.popleft()
        under_way.append((begin(buffer, moved), buffer))
        moved += _CHUNK_BYTES
    for request, _ in under_way:
        request.wait()
    return moved, max(time.monotonic() - start, 1e-6)


def _direct_row(direct: bool, disk: Any) -> Row:
    if direct:
        return _row("O_DIRECT", "green", "works: transfers go past the page cache")
    value = f"{disk.filesystem} has none: transfers go through the page cache, which is slower and takes host memory"
    return _row("O_DIRECT", "yellow", value, "meshbolt doctor --path /path/on/ext4/or/xfs")


def _speed_rows(write: float, read: float, *, direct: bool) -> list[Row]:
    rows = []
    for name, rate in (("write", write), ("read", read)):
        is_slow = rate < _SLOW_BYTES_PER_SECOND
        notes = [*([] if direct else ["of the page cache"]), *(["an optimizer there waits"] if is_slow else [])]
        value = ", ".join([f"{format_bytes(rate)}/s", *notes])
        mend = "meshbolt doctor --path /path/on/nvme   # or Offload('cpu')" if is_slow else ""
        rows.append(_row(f"{name} speed", "yellow" if is_slow else "green", value, mend, bytes_per_second=rate))
    return rows


def _row(name: str, status: Status, value: str, mend: str = "", **measured: float) -> Row:
    return Row(area="disk", name=name, status=status, value=value, mend=mend, measured=measured)
