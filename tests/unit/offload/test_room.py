"""What does not fit is refused with the numbers, for all ranks of a machine together."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbolt.errors import StorageError
from meshbolt.offload.planning import Needs
from meshbolt.offload.room import Room, check_room, free_memory_bytes, room_of

GIB = 2**30


def room(
    machine: str = "a", *, host: int = 0, file: int = 0, memory: int = 100, disk: int = 100, device: str = "1"
) -> Room:
    needs = Needs(host_bytes=host * GIB, device_bytes=0, file_bytes=file * GIB)
    return Room(machine, needs, memory * GIB, (device, disk * GIB) if file else None)


def test_what_fits_is_taken() -> None:
    check_room(
        [
            room(host=50),
            room(host=50),
            room("b", host=100),
            room("b", file=60, device="1"),
            room("b", file=60, device="2"),
        ]
    )


def test_ranks_of_a_machine_share_its_memory() -> None:
    with pytest.raises(
        StorageError,
        match=r"needs 120\.0 GiB of host memory on a, for 2 ranks, and 100\.0 GiB are free.*fraction=0\.79",
    ):
        check_room([room(host=60), room("b", host=60), room(host=60)])


def test_they_share_a_disk() -> None:
    with pytest.raises(
        StorageError, match=r"files of 2 ranks on a need 120\.0 GiB, and their disk has 100\.0 GiB free"
    ):
        check_room([room(file=60), room(file=60), room(file=60, device="2")])


def test_little_memory_leaves_no_fraction_to_advise() -> None:
    with pytest.raises(StorageError, match=r"are free\. Use Offload\('nvme', path=\.\.\.\), more machines\."):
        check_room([room(host=2000)])


def test_a_machine_knows_what_it_has(tmp_path: Path) -> None:
    found = room_of(Needs(host_bytes=1, device_bytes=0, file_bytes=1), path=tmp_path)
    assert found.memory_bytes == pytest.approx(free_memory_bytes(), rel=0.5)
    assert found.disk is not None
    assert min(found.memory_bytes, found.disk[1]) > 0
    assert room_of(Needs(host_bytes=1, device_bytes=0, file_bytes=0), path=None).disk is None


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing"):
        room_of(Needs(host_bytes=0, device_bytes=0, file_bytes=1), path=tmp_path / "missing" / "deeper")
