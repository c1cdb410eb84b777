"""`meshbolt explain file.py:name`: what is written in Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshbolt.cli.python_plan import explain_object, is_python
from meshbolt.config.load import load
from meshbolt.errors import ConfigError

SCRIPT = """
import lightning.pytorch as pl
from meshbolt import MeshStrategy, Zero
from meshbolt.deepspeed import trainer_arguments
from meshbolt.plugins import MixedPrecision
print("imported")
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
strategy = MeshStrategy(zero=Zero(stage=3, replicate=2), recompute="full")
preset = dict(strategy="zero2", precision="bf16-mixed", devices=4, accelerator="cpu", max_steps=5)
ddp = dict(strategy="ddp")
typed = dict(strategy="zero1", devises=2)
plugged = dict(strategy=MeshStrategy(zero=1, precision_plugin=MixedPrecision("bf16-mixed", "cpu", autocast=False)))
from_deepspeed = trainer_arguments({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, show=False)
trainer = pl.Trainer(strategy=MeshStrategy(zero=1), accelerator="cpu", devices=2, precision="bf16-mixed", max_steps=7, **quiet)
plain = pl.Trainer(accelerator="cpu", devices=1, **quiet)
class group:
    inner = dict(strategy="zero3")
def make():
    print("made")
    return dict(strategy=strategy, devices=2)
def fails():
    raise RuntimeError("no GPU")
number = 3
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("scripts") / "training_to_explain.py"
    path.write_text(SCRIPT)
    before = list(sys.path)
    yield path
    sys.path[:] = before
    sys.modules.pop(path.stem, None)


def explained(script: Path, name: str, *overrides: tuple[str, str]) -> dict[str, Any]:
    return explain_object(f"{script}:{name}", load([], overrides=overrides)).as_data()


def test_a_trainer_is_explained_as_it_was_made(script: Path) -> None:
    name, data = f"{script}:trainer", explained(script, "trainer")
    plan = data["plan"]
    assert plan["zero.stage"] == {"value": 1, "from": f"{name}: zero"}
    assert plan["compile"] == {"value": False, "from": "default"}
    assert plan["world_size"]["value"] == 2
    assert plan["precision.flag"]["value"] == "bf16-mixed"
    assert data["given"] == {"trainer.max_steps": {"value": "7", "from": "Trainer(max_steps=...)"}}
    with pytest.raises(ConfigError, match="a Trainer that is made"):
        explained(script, "trainer", ("trainer.devices", "4"))


def test_arguments_of_a_trainer_are_explained_with_overrides(script: Path) -> None:
    plan = explained(script, "preset", ("trainer.devices", "8"))["plan"]
    assert plan["zero.stage"] == {"value": 2, "from": f"{script}:preset: zero"}
    assert plan["world_size"] == {"value": 8, "from": "command line: trainer.devices"}
    assert plan["precision.flag"] == {"value": "bf16-mixed", "from": f"{script}:preset: trainer.precision"}
    assert explained(script, "preset")["given"] == {"trainer.max_steps": {"value": 5, "from": f"{script}:preset"}}


@pytest.mark.parametrize(("name", "stage"), [("strategy", 3), ("make", 3), ("group.inner", 3), ("plugged", 1)])
def test_a_strategy_and_what_a_function_returns_are_explained(script: Path, name: str, stage: int) -> None:
    assert explained(script, name)["plan"]["zero.stage"]["value"] == stage


def test_devices_that_nobody_knows_are_left_out(script: Path) -> None:
    assert "world_size" not in explained(script, "strategy")["plan"]
    assert explained(script, "strategy", ("trainer.devices", "4"))["plan"]["mesh.dp_shard"]["value"] == 2


def test_a_plugin_of_the_strategy_decides_its_precision(script: Path) -> None:
    plan = explained(script, "plugged")["plan"]
    assert plan["precision.flag"] == {"value": "bf16-mixed", "from": f"{script}:plugged: trainer.strategy"}
    assert plan["precision.autocast_dtype"]["value"] is None


def test_a_strategy_from_deepspeeds_file_has_the_files_origins_and_receipt(script: Path) -> None:
    data = explained(script, "from_deepspeed")
    assert data["plan"]["zero.stage"]["from"] == "the DeepSpeed configuration: zero_optimization.stage"
    assert data["plan"]["precision.flag"]["from"] == "the DeepSpeed configuration: bf16.enabled"
    assert data["receipt"][0]["key"] == "zero_optimization.stage"


def test_what_a_file_prints_does_not_get_into_the_answer(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explained(script, "make")
    said = capsys.readouterr()
    assert said.out == ""
    assert "made" in said.err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (":ddp", "strategy='ddp', so there is no plan of meshbolt's"),
        (":typed", "devises .* did you mean 'devices'"),
        (":plain", "has the strategy SingleDeviceStrategy"),
        (":number", "is of int, and nothing to explain"),
        (":trainr", "did you mean 'trainer'"),
        (":fails", r"fails\(\) raises RuntimeError: no GPU"),
        ("", "names no object"),
    ],
)
def test_what_cannot_be_explained_is_refused(script: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        explain_object(f"{script}{name}", load([]))


@pytest.mark.parametrize(
    ("content", "said"),
    [("raise SystemExit(3)", "SystemExit: 3"), ("import nowhere_at_all", "No module named"), ("x = (", "SyntaxError")],
)
def test_a_file_that_cannot_be_imported_is_named(tmp_path: Path, content: str, said: str) -> None:
    (path := tmp_path / "broken_to_explain.py").write_text(content)
    with pytest.raises(ConfigError, match=said) as error:
        explain_object(f"{path}:x", load([]))
    assert str(path) in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        explain_object(f"{tmp_path}/none.py:x", load([]))
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        explain_object("no_such_module:x", load([]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.py:c", True),
        ("a/b.py", True),
        ("a.b:c.d", True),
        ("run.yaml", False),
        ("a:b.yaml", False),
        ("ds.json", False),
    ],
)
def test_names_in_python_are_told_from_files(name: str, expected: bool) -> None:
    assert is_python(name) is expected
