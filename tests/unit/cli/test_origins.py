"""Where a report says that settings of `meshbolt fit` are from."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbolt.cli.origins import origins_of

CONFIG = """
trainer:
  strategy:
    class_path: meshbolt.MeshStrategy
    init_args: {zero: 1}
  devices: 2
  accelerator: cpu
  max_steps: 10
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("form", ["--config {}", "--config={}", "-c {}"])
def test_files_and_the_command_line_are_told_apart(form: str, config: Path) -> None:
    words = form.format(config).split()
    origins = origins_of([*words, "--trainer.precision", "bf16-mixed", "--trainer.accumulate_grad_batches=2"])

    assert origins["zero.stage"] == f"{config}: trainer.strategy.init_args.zero"
    assert origins["world_size"] == f"{config}: trainer.devices"
    assert origins["precision.flag"] == "command line: trainer.precision"
    assert origins["zero.replicate"] == "default"
    assert origins["trainer.max_steps"] == f"{config}: trainer.max_steps"
    assert origins["trainer.accumulate_grad_batches"] == "command line: trainer.accumulate_grad_batches"


@pytest.mark.parametrize(
    "arguments", [["--trainer.strategy=ddp"], ["--config=/nowhere.yaml"], ["--nonsense=1"], ["positional"]]
)
def test_what_cannot_be_explained_has_no_origins_and_is_not_refused(arguments: list[str]) -> None:
    assert origins_of(arguments) == {}


def test_settings_out_of_deepspeeds_file_name_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}}')
    (config := tmp_path / "run.yaml").write_text(
        "trainer: {accelerator: cpu, devices: 2, strategy: {class_path: meshbolt.MeshStrategy.from_deepspeed, "
        f"init_args: {{config: {file}}}}}}}"
    )
    origins = origins_of(["--config", str(config)])

    assert origins["zero.stage"] == f"{file}: zero_optimization.stage"
    assert origins["precision.flag"] == f"{file}: bf16.enabled"
    assert origins["world_size"] == f"{config}: trainer.devices"
    assert capsys.readouterr().out == ""
