"""The tables of `meshbolt explain`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshbolt.cli.explain import run
from meshbolt.cli.planned import Row
from meshbolt.cli.sections import Explanation, Section


def test_a_section_without_rows_is_for_programs_only(capsys: pytest.CaptureFixture[str]) -> None:
    explanation = Explanation([Section("a", "first", [Row("x", [1], "there")]), Section("b", "second", [])])
    explanation.show()
    assert capsys.readouterr().out.splitlines() == [
        "first",
        "  setting  value  where from",
        "  x        [1]    there",
    ]
    assert explanation.as_data() == {"a": {"x": {"value": [1], "from": "there"}}, "b": {}}


def test_a_file_of_deepspeeds_is_shown_with_its_receipt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}}')
    assert run(["explain", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"what becomes of {path}" in said
    assert "zero_optimization.overlap_comm true ignored" in " ".join(said.split())
    assert run(["explain", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["receipt"][1]["outcome"] == "ignored"
