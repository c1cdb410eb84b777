"""Whether what is to lie outside of the devices fits into the machine, known before anything is made."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from meshbolt.compat import peak_allocated
from meshbolt.errors import StorageError
from meshbolt.offload.planning import Needs
from meshbolt.offload.scratch import disk_of
from meshbolt.units import format_bytes

_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class Room:
    """What one rank needs, and what its machine has.

    Attributes:
        machine: its name.
        needs: of the rank.
        memory_bytes: that are free on the machine.
        disk: which file system the rank's files are made on, and its free bytes; None: it makes none.
    """

    machine: str
    needs: Needs
    memory_bytes: int
    disk: tuple[str, int] | None


def room_of(needs: Needs, *, path: str | os.PathLike[str] | None) -> Room:
    """Return what a rank needs beside what its machine has.

    Args:
        needs: of the rank.
        path: the directory of its files; None: it makes none.

    Raises:
        StorageError: the directory cannot be used.
    """
    disk = None
    if path is not None:
        found = disk_of(path)
        disk = str(Path(found.folder).stat().st_dev), found.free_bytes
    return Room(socket.gethostname(), needs, free_memory_bytes(), disk)


def free_memory_bytes() -> int:
    """Return how much memory this machine, or this container of it, has left."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = _LIMIT.read_text().strip(), int(_USED.read_text())
    except (OSError, ValueError):
        return free
    return min(free, int(limit) - used) if limit.isdigit() else free


def spare_bytes(device: torch.device, *, ranks: int) -> int:
    """Return the memory of a device that training has left so far, by its highest use, without a twentieth for what varies.

    Args:
        device: of this rank; a CPU's memory is the host's, with what is free now.
        ranks: of this machine.
    """
    if device.type == "cpu":
        return max(0, free_memory_bytes() - psutil.virtual_memory().total // _KEPT) // ranks
    free, total = torch.cuda.mem_get_info(device)
    spare = free + torch.cuda.memory_reserved(device) - peak_allocated(device) - total // _KEPT
    return max(0, spare) // -(-ranks // torch.cuda.device_count())


_KEPT = 20


def check_room(rooms: Sequence[Room], *, what: str = "the state of optimizers") -> None:
    """Refuse what does not fit into the memory or onto the disk that ranks of one machine share.

    Args:
        rooms: of all ranks, in their order.
        what: is to lie there, for the message.

    Raises:
        StorageError: something does not.
    """
    for machine, ranks in _by_machine(rooms).items():
        needed, free = sum(room.needs.host_bytes for room in ranks), min(room.memory_bytes for room in ranks)
        if needed > free:
            raise StorageError(
                f"offload: {what} need{'s' if 'state' in what else ''} {format_bytes(needed)} of host memory on {machine}, for "
                f"{len(ranks)} ranks, and {format_bytes(free)} are free. {_advice(needed, free)}"
            )
        for disk in sorted({room.disk[0] for room in ranks if room.disk is not None}):
            own = [room for room in ranks if room.disk is not None and room.disk[0] == disk]
            needed, free = sum(room.needs.file_bytes for room in own), min(room.disk[1] for room in own if room.disk)
            if needed > free:
                raise StorageError(
                    f"offload: the files of {len(own)} ranks on {machine} need {format_bytes(needed)}, and their disk has "
                    f"{format_bytes(free)} free. Free space there, give a path on another disk, or train on more machines."
                )


def _advice(needed: int, free: int) -> str:
    share = free / needed
    fits = f"fraction={int(share * 95) / 100}" if share > _WORTH else ""  # a twentieth for everything else
    ways = [
        f"Offload('cpu', {fits}) if the devices hold the rest" if fits else "",
        "Offload('nvme', path=...)",
        "more machines",
    ]
    return f"Use {', '.join(way for way in ways if way)}."


_WORTH = 0.1


def _by_machine(rooms: Sequence[Room]) -> Mapping[str, list[Room]]:
    machines: dict[str, list[Room]] = {}
    for room in rooms:
        machines.setdefault(room.machine, []).append(room)
    return machines
