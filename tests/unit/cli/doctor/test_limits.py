"""Limits of the system, from what it writes in its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbolt.cli.doctor import limits
from meshbolt.units import GIB, MIB


def test_every_limit_of_this_machine_has_a_row() -> None:
    rows = [limits.shared_memory_row(), *limits.limit_rows(), *limits.memory_rows()]
    assert [row.name for row in rows] == [
        "shared memory",
        "open files",
        "processes and threads",
        "locked memory",
        "host memory",
        "processors",
    ]
    assert all(row.mend for row in rows if row.status == "red")


def test_no_shared_memory_is_red_with_the_command_that_mounts_it(tmp_path: Path) -> None:
    row = limits.shared_memory_row(str(tmp_path / "missing"))
    assert row.status == "red"
    assert "mount -t tmpfs" in row.mend


@pytest.mark.parametrize(
    ("limit", "has_infiniband", "status"),
    [(8 * MIB, False, "green"), (8 * MIB, True, "red"), (-1, True, "green"), (64 * GIB, True, "green")],
)
def test_locked_memory_matters_where_infiniband_registers_it(limit: int, has_infiniband: bool, status: str) -> None:
    assert limits.locked_memory_row(limit, has_infiniband=has_infiniband).status == status


MACHINE = {"MemTotal": 64 * GIB, "MemAvailable": 40 * GIB}


@pytest.mark.parametrize(
    ("meminfo", "cgroup", "status", "free"),
    [
        (MACHINE, None, "green", 40 * GIB),
        (MACHINE, (16 * GIB, 2 * GIB), "green", 14 * GIB),
        (MACHINE, (16 * GIB, 15 * GIB), "yellow", GIB),
        (MACHINE, (16 * GIB, 16 * GIB), "red", 0),
        (MACHINE, (999 * GIB, 1), "green", 40 * GIB),
        ({**MACHINE, "MemAvailable": 100 * MIB}, None, "red", 100 * MIB),
    ],
)
def test_memory_is_that_of_the_container_where_it_is_less(
    meminfo: dict[str, int], cgroup: tuple[int, int] | None, status: str, free: int
) -> None:
    row = limits.memory_row(meminfo, cgroup)
    assert (row.status, row.measured["free_bytes"]) == (status, free)


def test_the_lowest_limit_of_nested_control_groups_counts(tmp_path: Path) -> None:
    inner = tmp_path / "user" / "job"
    inner.mkdir(parents=True)
    for folder, limit, use in ((tmp_path, "max", "9"), (tmp_path / "user", "5000", "7"), (inner, "8000", "6")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(use)
    own = tmp_path / "own"
    own.write_text("0::/user/job\n")
    assert limits.cgroup_memory(tmp_path, own) == (5000, 7)


def test_the_older_control_groups_are_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "memory" / "docker"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("4096")
    (folder / "memory.usage_in_bytes").write_text("96")
    own = tmp_path / "own"
    own.write_text("3:cpu:/x\n2:memory:/docker\n")
    assert limits.cgroup_memory(tmp_path, own) == (4096, 96)


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert limits.cgroup_memory(tmp_path, tmp_path / "none") is None
