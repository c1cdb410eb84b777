from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import pytest

from meshbolt.errors import ConfigError
from meshbolt.monitoring import Records, latest_run, read_records


def test_records_of_all_ranks_come_back_in_the_order_of_their_time(tmp_path: Path) -> None:
    ranks = [Records(tmp_path / "new" / "records", rank) for rank in range(2)]
    for step in range(3):
        for records in ranks:
            records.write("throughput", step=step, values={"a/b": step + 0.5, "a/c": None, "a/d": "x"}, axis="tp")

    read = list(read_records(tmp_path / "new" / "records"))
    assert [(each["step"], each["rank"]) for each in read] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert read[-1]["values"] == {"a/b": 2.5, "a/c": None, "a/d": "x"}
    assert read[-1]["kind"] == "throughput"
    assert read[-1]["axis"] == "tp"


def test_a_line_is_on_the_disk_when_write_returns(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    records.write("k", step=1, values={})
    assert json.loads(records.path.read_text())["step"] == 1


@pytest.mark.parametrize("torn", [b'{"kind": "k", "ste', b'{"kind": "k"}\n["x"]', b"\xff\x00"])
def test_a_torn_line_is_ignored_and_the_next_run_does_not_continue_it(tmp_path: Path, torn: bytes) -> None:
    first = Records(tmp_path, 0, run="1")
    first.write("k", step=1, values={})
    first.close()
    with first.path.open("ab") as file:
        file.write(torn)
    assert [record["step"] for record in read_records(tmp_path)] == [1]

    Records(tmp_path, 0, run="2").write("k", step=2, values={})
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]
    assert [record["step"] for record in latest_run(read_records(tmp_path))] == [2]


def test_numbers_that_json_does_not_know_are_written_as_text(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    records.write("k", step=1, values={"a/b": math.nan, "a/c": -math.inf}, more=[{"x": math.inf}])
    line = records.path.read_text()
    read = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert read["values"] == {"a/b": "nan", "a/c": "-inf"}
    assert read["more"] == [{"x": "inf"}]


def test_nothing_is_left_of_records_to_which_nobody_has_written(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for directory in (tmp_path / "run" / "meshbolt_records", mine):
        ranks = [Records(directory, rank) for rank in range(2)]
        for records in ranks:
            records.close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "run"]

    one, other = Records(mine, 0), Records(mine, 1)
    other.write("k", step=1, values={})
    one.close()
    other.close()
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["rank_1.jsonl"]


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    threads = [
        threading.Thread(target=lambda: [records.write("k", step=n, values={"a/b": "x" * 500}) for n in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in records.path.read_text().splitlines()]) == 200


@pytest.mark.parametrize("place", ["s3://bucket/records", "a_file/records"])
def test_a_directory_that_cannot_be_written_is_refused_with_its_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "a_file").write_text("")
    directory = place if "://" in place else tmp_path / place
    with pytest.raises(ConfigError, match=r"records.*directory='...'"):
        Records(directory, 0)


def test_a_disk_that_becomes_full_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("needs /dev/full")
    (tmp_path / "rank_0.jsonl").symlink_to("/dev/full")
    records = Records(tmp_path, 0)
    with pytest.warns(UserWarning, match=r"No space left.*Training goes on"):
        records.write("k", step=1, values={})
    records.write("k", step=2, values={})


def test_a_directory_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no records"):
        list(read_records(tmp_path))


def test_no_records_are_no_run() -> None:
    assert latest_run([]) == []
