"""`meshbolt report`: from records to a file, with exit codes that a script can go by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.monitoring.report.made_up import BEGUN, make_run

from meshbolt.cli import report
from meshbolt.cli.main import COMMANDS
from meshbolt.errors import ConfigError


def test_the_report_is_written_beside_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run" / "meshbolt_records", ranks=1, steps=20)

    assert report.run(["report", str(tmp_path)]) == 0
    path = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out == f"report of run 1 of 1: {path}\n"
    assert "ByteGPT" in path.read_text()


def test_of_several_runs_the_last_is_taken_and_the_others_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, ranks=1, steps=20, run="1")
    make_run(tmp_path, ranks=1, steps=30, run="2", begun=BEGUN + 1000)

    assert report.run(["report", str(tmp_path)]) == 0
    written = capsys.readouterr().out
    assert "report of run 2 of 2" in written
    assert [line.split()[0] for line in written.splitlines()[2:4]] == ["1", "2"]

    assert report.run(["report", str(tmp_path), "--run", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["steps"] == 20


def test_json_tells_the_figures_and_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, ranks=2, steps=100)
    path = tmp_path / "elsewhere" / "a.html"

    assert report.run(["report", str(tmp_path), "--json", "--output", str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert path.exists()
    assert (told["report"], told["run"], told["runs"], told["status"]) == (str(path), 1, 1, "finished")
    assert told["figures"]["peak_memory_bytes"] > 2**30
    assert set(told["last"]) >= {"train_loss", "lr"}


def test_where_nothing_was_recorded_the_answer_is_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.run(["report", str(tmp_path)]) == 1
    assert "RunReport()" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}/nowhere"], "is no directory"),
        ([""], "'' is no directory"),
        (["{}", "--run", "2"], "--run=2 is none of the 1 runs"),
        (["{}", "--run", "0"], "--run=0"),
        (["{}", "--output", "{}/rank_0.jsonl/x.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], said: str, tmp_path: Path) -> None:
    make_run(tmp_path, ranks=1, steps=20)

    with pytest.raises(ConfigError, match=said):
        report.run(["report", *(each.format(tmp_path) for each in arguments)])


def test_the_command_is_in_the_table() -> None:
    assert COMMANDS["report"].module == "meshbolt.cli.report"
