"""If these fail, a report is about another run than it says, or counts steps that were run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.monitoring.report.made_up import BEGUN, Writer, make_run

from meshbolt.errors import ConfigError
from meshbolt.monitoring.report import find_runs
from meshbolt.monitoring.report.gather import gather
from meshbolt.monitoring.report.sections import all_events


def test_runs_are_found_below_a_directory_the_oldest_first(tmp_path: Path) -> None:
    make_run(tmp_path / "b" / "meshbolt_records", ranks=1, steps=20, begun=BEGUN)
    make_run(tmp_path / "a" / "meshbolt_records", ranks=1, steps=30, begun=BEGUN + 1000)

    assert [run.directory.parent.name for run in find_runs(tmp_path)] == ["b", "a"]
    assert [run.last_step for run in find_runs(tmp_path)] == [20, 30]


def test_two_runs_in_one_directory_are_two(tmp_path: Path) -> None:
    make_run(tmp_path, ranks=2, steps=20, run="1")
    make_run(tmp_path, ranks=2, steps=50, run="2", begun=BEGUN + 1000)
    runs = find_runs(tmp_path)

    assert [run.last_step for run in runs] == [20, 50]
    assert len(list(runs[0].records())) < len(list(runs[1].records()))


def test_a_run_that_went_on_from_a_checkpoint_is_one_and_its_steps_count_once(tmp_path: Path) -> None:
    make_run(tmp_path, ranks=2, steps=90, run="1", end={"status": "failed", "text": "on purpose"})
    make_run(tmp_path, ranks=2, steps=120, first=50, run="2", begun=BEGUN + 1000)
    (run,) = find_runs(tmp_path)
    found = gather(run)

    assert [attempt.first_step for attempt in run.attempts] == [0, 50]
    steps = [each.first for each in found.logged["train_loss"].stretches()]
    assert steps == list(range(10, 121, 10))
    assert all(each.count == 1 for each in found.logged["train_loss"].stretches())
    texts = [event.text for event in all_events(found)]
    assert any("steps 51 to 90 were run again" in text for text in texts)
    assert any("on purpose" in text for text in texts)


def test_a_program_that_was_started_again_before_its_first_checkpoint_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path, ranks=1, steps=30, run="1")
    make_run(tmp_path, ranks=1, steps=60, run="2", begun=BEGUN + 1000, start={"restarts": 1})
    (run,) = find_runs(tmp_path)

    assert [each.first for each in gather(run).logged["train_loss"].stretches()] == [10, 20, 30, 40, 50, 60]


def test_a_torn_last_line_and_lines_that_are_none_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, ranks=2, steps=30)
    whole = gather(find_runs(tmp_path)[0])
    with (tmp_path / "rank_1.jsonl").open("ab") as file:
        file.write(b'\n[1, 2]\n"text"\n\xff\xfe\n{"kind": "memory", "step": 40, "time_sec')
    found = gather(find_runs(tmp_path)[0])

    assert found.num_records == whole.num_records
    assert found.run.last_step == 30


def test_lines_that_another_program_has_written_count_as_well(tmp_path: Path) -> None:
    make_run(tmp_path, ranks=1, steps=30)
    (plain,) = find_runs(tmp_path)
    path = tmp_path / "rank_0.jsonl"
    lines = [json.dumps(json.loads(line), sort_keys=True, indent=None) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    (other,) = find_runs(tmp_path)

    assert other.attempts == plain.attempts


def test_records_with_odd_values_do_not_stop_a_report(tmp_path: Path) -> None:
    with Writer(tmp_path, 0) as writer:
        writer.write("metrics", 1, {"train_loss": "nan", "name": "text", "list": [1], "nothing": None})
        writer.write("metrics", 2, {"train_loss": 1.5})
        writer.write("memory", 2, {"memory/peak_bytes": "inf"})
        writer.write("communication", 2, {}, rows=[{"axis": "tp"}, 3, None])
        writer.write("event", 2, {})
        writer.write("pipeline", 2, {}, timelines=[])
    found = gather(find_runs(tmp_path)[0])

    assert found.logged["train_loss"].num_not_finite == 1
    assert found.texts["name"] == "text"
    assert not found.communication


def test_a_directory_without_records_has_no_runs(tmp_path: Path) -> None:
    assert find_runs(tmp_path) == []


def test_a_run_that_was_killed_has_no_end(tmp_path: Path) -> None:
    with Writer(tmp_path, 0) as writer:
        writer.write("metrics", 1, {"train_loss": 1.0})
    (run,) = find_runs(tmp_path)

    assert run.end is None
    assert run.start == {}


def test_a_report_that_cannot_be_written_is_refused_with_its_path(tmp_path: Path) -> None:
    from meshbolt.monitoring.report import write_report

    make_run(tmp_path / "records", ranks=1, steps=10)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.report\.html"):
        write_report(find_runs(tmp_path / "records")[0], tmp_path / "file" / "report.html")
