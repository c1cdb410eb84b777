"""How far a command is, in a log: a line when there is time for one, and nothing for a program."""

from __future__ import annotations

import pytest

from meshbolt.cli.checkpoint import progress
from meshbolt.units import MIB


def test_lines_say_how_much_of_how_much_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_INTERVAL_SECONDS", 0.0)
    with progress.watched("exporting", show=True) as watch:
        watch.on_total(4 * MIB)
        watch.on_bytes(MIB)
        watch.on_bytes(3 * MIB)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("exporting | MiB 1 of 4 | ")
    assert lines[1].startswith("exporting | MiB 4 of 4 | ")
    assert lines[0].endswith("/s")


def test_a_program_that_reads_json_gets_no_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_INTERVAL_SECONDS", 0.0)
    with progress.watched("exporting", show=False) as watch:
        watch.on_total(4 * MIB)
        watch.on_bytes(MIB)
    assert capsys.readouterr().out == ""
