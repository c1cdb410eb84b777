"""`meshbolt explain ds_config.json`: DeepSpeed's file by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshbolt.cli.deepspeed_plan import explain_file, is_deepspeed
from meshbolt.config.load import load
from meshbolt.errors import ConfigError, MeshboltError

FILE = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": 2},
}
CPU = ("trainer.accelerator", "cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FILE))
    return path


def explained(path: Path, *overrides: tuple[str, str]) -> dict[str, Any]:
    data = explain_file(str(path), load([], overrides=overrides)).as_data()
    return json.loads(json.dumps(data).replace(f"{path}: ", ""))  # type: ignore[no-any-return]


def test_without_devices_what_follows_from_them_is_left_out(file: Path) -> None:
    data = explained(file)
    assert list(data) == ["plan", "trainer", "optimizer", "scheduler", "receipt"]
    plan = data["plan"]
    assert plan["zero.stage"] == {"value": 2, "from": "zero_optimization.stage"}
    assert plan["precision.flag"] == {"value": "bf16-mixed", "from": "bf16.enabled"}
    assert plan["precision.autocast_dtype"]["value"] is None, "16 bits for everything, as under DeepSpeed"
    assert plan["zero.replicate"]["from"] == "default of meshbolt"
    assert not [key for key in plan if key.startswith(("mesh.", "world_size"))]
    assert data["trainer"]["accumulate_grad_batches"]["value"] == "8 / data-parallel ranks"
    assert {row["key"] for row in data["receipt"] if row["given"]} >= {"train_batch_size", "optimizer.params.lr"}


def test_devices_decide_what_follows_from_them(file: Path) -> None:
    data = explained(file, ("trainer.devices", "2"), ("trainer.num_nodes", "2"), CPU)
    assert data["plan"]["world_size"]["value"] == 4
    assert data["plan"]["world_size"]["from"] == "command line: trainer.devices, command line: trainer.num_nodes"
    assert data["plan"]["mesh.dp_shard"]["value"] == 4
    assert data["trainer"]["accumulate_grad_batches"]["value"] == 2


def test_values_for_auto_and_the_version_are_taken_from_the_command_line(file: Path) -> None:
    assert explained(file)["optimizer"]["lr"] == {"value": "auto", "from": "optimizer.params.lr (auto)"}
    data = explained(file, ("auto.optimizer.params.lr", "1e-4"), ("deepspeed_version", "0.19.8"))
    assert data["optimizer"]["lr"]["value"] == 1e-4
    assert data["trainer"]["gradient_clip_val"] == {"value": 1.0, "from": "default of DeepSpeed 0.19.8"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([("trainer.max_steps", "3")], "--trainer.max_steps is none of what a DeepSpeed file takes"),
        ([("trainer.devices", "3"), CPU], "32 is no multiple of 12"),
        ([("trainer.devices", "many"), CPU], "trainer.devices='many'"),
        ([("auto", "3")], "--auto=3 has no keys"),
        ([("auto.optimizer.params.lrr", "3")], "did you mean 'optimizer.params.lr'"),
        ([("deepspeed_version", "new")], "deepspeed_version='new' is no version"),
    ],
)
def test_what_does_not_go_with_the_file_is_refused(file: Path, overrides: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        explained(file, *overrides)


def test_stages_and_layers_take_the_ranks_that_they_need(tmp_path: Path) -> None:
    (path := tmp_path / "ds.json").write_text(
        '{"pipeline": {"stages": 2}, "tensor_parallel": {"autotp_size": 2}, "gradient_accumulation_steps": 4}'
    )
    assert explained(path)["plan"]["pipeline_parallel.stages"]["value"] == 2
    assert explained(path, ("trainer.devices", "8"), CPU)["plan"]["mesh.dp_replicate"]["value"] == 2
    with pytest.raises(MeshboltError, match="take 4 ranks together, and 6"):
        explained(path, ("trainer.devices", "6"), CPU)


def test_json_of_fit_is_told_from_deepspeeds(tmp_path: Path) -> None:
    (path := tmp_path / "fit.json").write_text('{"trainer": {"strategy": "zero2"}}')
    assert not is_deepspeed(str(path))
    assert not is_deepspeed("run.yaml")
    (path := tmp_path / "ds.json").write_text("{}")
    assert is_deepspeed(str(path))
    path.write_text('{"fp16": }')
    with pytest.raises(ConfigError, match="line 1, column 10"):
        is_deepspeed(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        is_deepspeed(str(tmp_path / "none.json"))
