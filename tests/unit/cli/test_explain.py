from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshbolt.cli.explain import run, split_overrides
from meshbolt.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "trainer: {strategy: zero2, accelerator: cpu, devices: 2, max_steps: 7, callbacks: [{class_path: a.B}]}"
    )
    return path


def test_overrides_are_told_from_files_and_flags() -> None:
    known, overrides = split_overrides(
        ["a.yaml", "--trainer.devices", "4", "--json", "--model.dim=8", "b.yaml", "--model.x=-1"]
    )

    assert known == ["a.yaml", "--json", "b.yaml"]
    assert overrides == [("trainer.devices", "4"), ("model.dim", "8"), ("model.x", "-1")]


def test_a_value_may_hold_an_equals_sign_or_be_empty() -> None:
    assert split_overrides(["--data.a=b=c", "--data.d="])[1] == [("data.a", "b=c"), ("data.d", "")]


@pytest.mark.parametrize("arguments", [["--trainer.devices"], ["--trainer.devices", "--json"]])
def test_an_override_without_a_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--trainer\.devices has no value"):
        split_overrides(arguments)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--jsn", "--jsn is not an option: did you mean 'json'"),
        ("--modell=8", "did you mean 'model'"),
        ("--qqq=1", "meshbolt fit --help"),
    ],
)
def test_what_is_no_option_and_no_key_of_fit_is_refused_with_the_nearest(argument: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split_overrides([argument, "a.yaml"])


def test_the_tables_show_values_and_where_they_are_from(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(config), "--trainer.devices", "4"]) == 0
    plan, _, given = capsys.readouterr().out.partition("also given")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in plan.splitlines()[1:]}

    assert rows["setting"] == ["value", "where from"]
    assert rows["world_size"] == ["4", "command line: trainer.devices"]
    assert rows["zero.stage"] == ["2", f"preset zero2, {config}: trainer.strategy"]
    assert rows["compile"] == ["false", "default"]
    assert rows["meta"] == ["auto", "default"]
    assert "trainer.max_steps" in given
    assert "a.B" in given
    assert "trainer.devices" not in given, "what the plan tells is not told twice"


def test_a_mapping_takes_a_line_for_each_of_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    setting = "{size: 2, plan: {b.*.up: colwise, b.*.down: rowwise}}"
    mesh = f"{{class_path: meshbolt.MeshStrategy, init_args: {{tensor_parallel: {setting}}}}}"
    path.write_text(f"trainer: {{strategy: {mesh}, accelerator: cpu, devices: 2}}")
    assert run(["explain", str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    at = next(index for index, line in enumerate(lines) if line.startswith("tensor_parallel.plan"))
    assert lines[at].startswith("tensor_parallel.plan b.*.up: colwise ")
    assert lines[at + 1] == "b.*.down: rowwise"


def test_json_says_the_same_to_programs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(config), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)

    assert said["plan"]["world_size"] == {"value": 2, "from": f"{config}: trainer.devices"}
    assert said["given"]["trainer.max_steps"] == {"value": 7, "from": str(config)}


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["explain", "--help"])

    assert ended.value.code == 0
    assert "example: meshbolt explain configs/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ds.json", "run.yaml"], r"ds\.json is explained by itself, and beside it stands run\.yaml"),
        (["run.yaml", "script.py:a"], r"script\.py:a is explained by itself"),
        (["run.yaml", "--deepspeed_version", "0.19.8"], "is for a DeepSpeed file by itself"),
        (["script.py:a", "--auto.x=1"], "is for a DeepSpeed file by itself"),
        (["ds.json", "--deepspeed_vers=1"], "did you mean 'deepspeed_version'"),
        (["missing.json"], "cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "run.yaml").write_text("trainer: {strategy: zero2}")
    with pytest.raises(ConfigError, match=said):
        run(["explain", *arguments])


def test_a_missing_configuration_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["explain"])

    assert ended.value.code == 2
    assert "config" in capsys.readouterr().err
