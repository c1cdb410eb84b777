"""Rows as they are found, printed and counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from meshbolt.cli.doctor.disk import disk_rows
from meshbolt.cli.doctor.main import run
from meshbolt.cli.doctor.ranks import measured_rows
from meshbolt.cli.doctor.rows import Check, Row, run_checks
from meshbolt.cli.doctor.show import as_json, closing, print_rows
from meshbolt.errors import ConfigError
from meshbolt.units import MIB

ROWS = [
    Row(area="disk", name="folder", status="green", value="fine", measured={"free_bytes": 3.0}),
    Row(area="disk", name="O_DIRECT", status="yellow", value="none", mend="meshbolt doctor --path elsewhere"),
    Row(area="network", name="name", status="red", value="un\nknown", mend="echo 127.0.1.1 me"),
]


def test_a_check_that_fails_by_itself_is_a_row_and_the_others_are_looked_at() -> None:
    def fail() -> list[Row]:
        raise ImportError("no torch.distributed")

    begun: list[str] = []
    checks = [Check("disk", "the disk", fail), Check("limits", "limits", lambda: ROWS[:1])]
    first, second = run_checks(checks, before=lambda check: begun.append(check.area))
    assert (first.area, first.status) == ("disk", "yellow")
    assert "ImportError: no torch.distributed" in first.value
    assert (second, begun) == (ROWS[0], ["disk", "limits"])


def test_json_has_every_row_and_how_many_are_red() -> None:
    content = json.loads(as_json(ROWS))
    assert (content["red"], content["yellow"], len(content["rows"])) == (1, 1, 3)
    assert content["rows"][0] == {
        "area": "disk",
        "name": "folder",
        "status": "green",
        "value": "fine",
        "mend": "",
        "measured": {"free_bytes": 3.0},
    }


def test_the_commands_stand_below_the_table_the_red_ones_first(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "red     network  name      un known"
    assert lines[3:] == closing(ROWS)
    assert lines.index("    echo 127.0.1.1 me") < lines.index("    meshbolt doctor --path elsewhere")
    assert lines[-1] == "1 green, 1 yellow, 1 red: training fails, or will, for the red ones"


def test_a_terminal_gets_a_table_and_no_colours_where_none_are_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    print_rows(ROWS)
    assert "\x1b[31mred" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    print_rows(ROWS)
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown
    assert "│ red" in shown


def test_a_folder_with_room_is_measured_and_left_empty(tmp_path: Path) -> None:
    rows = {row.name: row for row in disk_rows(str(tmp_path), file_bytes=32 * MIB, seconds=0.5)}
    assert rows["folder"].status != "red"
    assert rows["write speed"].measured["bytes_per_second"] > 0
    assert rows["read speed"].measured["bytes_per_second"] > 0
    assert "O_DIRECT" in rows
    assert list(tmp_path.iterdir()) == []


def test_a_file_given_as_folder_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (row,) = disk_rows(str(tmp_path / "file"))
    assert (row.status, row.mend) == ("red", f"meshbolt doctor --path {tmp_path}")
    assert "is a file" in row.value


def test_a_folder_that_was_asked_for_and_cannot_be_used_is_red() -> None:
    (row,) = disk_rows("/proc")
    assert row.status == "red"
    assert "df -h" in row.mend


def test_a_folder_that_is_not_there_is_red_and_is_not_made(tmp_path: Path) -> None:
    (row,) = disk_rows(str(tmp_path / "typo"))
    assert (row.status, row.mend.split()[:2]) == ("red", ["mkdir", "-p"])
    assert list(tmp_path.iterdir()) == []


def test_shared_memory_is_no_disk() -> None:
    rows = {row.name: row for row in disk_rows("/dev/shm", file_bytes=16 * MIB, seconds=0.1)}
    assert rows["folder"].status == "yellow"
    assert "host memory" in rows["folder"].value


@pytest.mark.full
def test_ranks_that_cannot_connect_are_red_with_what_they_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere7")
    (row,) = measured_rows("gloo", 2, limit_seconds=5.0)
    assert row.status == "red"
    assert "rank 0" in row.value
    assert "rank 1" in row.value
    assert "nowhere7" in row.value
    assert "GLOO_SOCKET_IFNAME=lo" in row.mend


@pytest.mark.parametrize("flag", ["--rank=2", "--path", "--ranks=two"])
def test_a_wrong_flag_is_bad_usage(flag: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(["doctor", flag])


def test_a_number_of_ranks_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ranks -1"):
        run(["doctor", "--ranks=-1"])


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(["doctor", "--help"])
    assert "meshbolt doctor --path scratch" in " ".join(capsys.readouterr().out.split())
