"""What the system allows this process: shared memory, files, processes, locked memory, host memory and processors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

from meshbolt.cli.doctor.rows import Row, Status
from meshbolt.units import GIB, KIB, MIB, format_bytes

_AREA = "limits"
_SHM = "/dev/shm"
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 2**60


def shared_memory_row(folder: str = _SHM) -> Row:
    """Return how much shared memory there is: workers of loaders hand batches on in it, and NCCL its messages.

    Args:
        folder: where it is.
    """
    try:
        room = os.statvfs(folder)
    except OSError as error:
        return _row(
            "shared memory", "red", f"{folder}: {error.strerror}", f"sudo mount -t tmpfs -o size=8G tmpfs {folder}"
        )
    total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    # Docker gives 64 MiB unless told otherwise, which a few batches of two workers fill.
    status: Status = "red" if total <= 64 * MIB or free < 16 * MIB else "yellow" if free < GIB else "green"
    mend = f"sudo mount -o remount,size=8G {folder}   # in a container: docker run --shm-size=8g ..."
    return _row(
        "shared memory",
        status,
        f"{format_bytes(free)} of {format_bytes(total)} free",
        "" if status == "green" else mend,
        free_bytes=free,
        total_bytes=total,
    )


def limit_rows() -> list[Row]:
    """Return the limits of this process that training runs into."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    return [
        _count_row("open files", files, red=256, yellow=4096, mend="ulimit -n 65536", key="files"),
        _count_row("processes and threads", _lowest(processes, _pids()), red=256, yellow=2048, mend=_MORE_PROCESSES),
        locked_memory_row(locked, has_infiniband=Path("/sys/class/infiniband").is_dir()),
    ]


_MORE_PROCESSES = "ulimit -u 65536   # in a container: docker run --pids-limit=-1 ..."


def locked_memory_row(limit: int, *, has_infiniband: bool) -> Row:
    """Return how much memory this process may lock.

    Drivers of GPUs lock ("pin") memory for copies by themselves and are not held by this limit; those of InfiniBand are.

    Args:
        limit: in bytes; negative for none.
        has_infiniband: whether this machine has such a network.
    """
    mend = "ulimit -l unlimited   # for good: '* - memlock unlimited' in /etc/security/limits.conf; docker: --ulimit memlock=-1"
    if _is_unlimited(limit):
        return _row("locked memory", "green", "unlimited")
    value = f"{format_bytes(limit)} (ulimit -l)"
    if has_infiniband and limit < GIB:
        return _row("locked memory", "red", f"{value}, and InfiniBand registers more", mend, limit_bytes=limit)
    return _row("locked memory", "green", f"{value}; GPUs' pinned memory is not held by it", "", limit_bytes=limit)


def memory_rows() -> list[Row]:
    """Return the memory and the processors that this process has."""
    meminfo = _meminfo(Path("/proc/meminfo").read_text())
    return [memory_row(meminfo, cgroup_memory()), _processors_row()]


def memory_row(meminfo: Mapping[str, int], cgroup: tuple[int, int] | None) -> Row:
    """Return how much host memory is left, of the machine and of this container.

    Args:
        meminfo: of the machine, in bytes.
        cgroup: limit and use of this container in bytes, if it has a limit.
    """
    free, total, where = meminfo["MemAvailable"], meminfo["MemTotal"], "of this machine"
    if cgroup is not None and cgroup[0] < total:
        where = f"of this container (the machine has {format_bytes(total)})"
        total = cgroup[0]
        free = min(free, max(0, total - cgroup[1]))
    status: Status = "red" if free < GIB else "yellow" if free < total / 10 else "green"
    mend = "ps -eo pid,user,rss,comm --sort=-rss | head   # shows who has it"
    return _row(
        "host memory",
        status,
        f"{format_bytes(free)} free of {format_bytes(total)} {where}",
        "" if status == "green" else mend,
        free_bytes=free,
        total_bytes=total,
    )


def cgroup_memory(root: Path = _CGROUP, own: Path = Path("/proc/self/cgroup")) -> tuple[int, int] | None:
    """Return the lowest memory limit of the control groups that this process is in, and the use under it; None: no limit.

    Args:
        root: where control groups are mounted.
        own: says which ones this process is in.
    """
    found = [each for folder in _groups(root, own) if (each := _limit_and_use(folder)) is not None]
    return min(found, default=None)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of a process's control groups, up to the root."""
    yield from (root, root / "memory")
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            parts = Path(path.lstrip("/"))
            base = root / controllers
            yield from (base / each for each in (parts, *parts.parents))


def _limit_and_use(folder: Path) -> tuple[int, int] | None:
    for limit, use in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            found = int((folder / limit).read_text()), int((folder / use).read_text())
        except (OSError, ValueError):  # "max" is none
            continue
        if found[0] < _UNLIMITED_BYTES:
            return found
    return None


def _processors_row() -> Row:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    value, cores = f"{usable} of {there} usable", float(usable)
    quota = _quota()
    if quota is not None and quota < usable:
        value, cores = f"{value}, for {quota:g} of their time (cgroup)", quota
    if cores < 1:
        return _row("processors", "yellow", value, "docker run --cpus=4 ...", usable=cores)
    return _row("processors", "green", value, usable=cores)


def _quota() -> float | None:
    """Return how many processors' time the control group has; None: all."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _pids() -> int:
    try:
        return int((_CGROUP / "pids.max").read_text())
    except (OSError, ValueError):
        return -1


def _meminfo(text: str) -> dict[str, int]:
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) * KIB for words in lines}


def _count_row(name: str, limit: int, *, red: int, yellow: int, mend: str, key: str = "count") -> Row:
    if _is_unlimited(limit):
        return _row(name, "green", "unlimited")
    status: Status = "red" if limit < red else "yellow" if limit < yellow else "green"
    return _row(name, status, f"{limit:,} at most", "" if status == "green" else mend, **{key: limit})


def _is_unlimited(limit: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit < 0 or limit >= _UNLIMITED_BYTES


def _lowest(*limits: int) -> int:
    return min((limit for limit in limits if not _is_unlimited(limit)), default=-1)


def _row(name: str, status: Status, value: str, mend: str = "", **measured: float) -> Row:
    return Row(area=_AREA, name=name, status=status, value=value, mend=mend, measured=measured)
