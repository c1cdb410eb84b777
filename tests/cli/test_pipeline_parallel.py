"""Pipelines from a file or a command line: every form comes to the same setting, and the recipe trains and is verified."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from lightning.pytorch.cli import LightningCLI
from tests.cli.support import CONFIGS, SMALL, meshbolt, meshbolt_on_ranks

from meshbolt import PipelineParallel
from meshbolt.cli.planned import explain_plan
from meshbolt.cli.train import MeshCLI
from meshbolt.config.load import load

# Lightning calls what jsonargparse 4.49 renamed.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RECIPE = CONFIGS / "pipeline_parallel.yaml"
SHORT = (
    "--data.length=16",
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
)
FORMS: dict[str, tuple[str, PipelineParallel]] = {
    "a number": ("2", PipelineParallel(2)),
    "fields": ("{size: 2, schedule: gpipe, microbatches: 3}", PipelineParallel(2, schedule="gpipe", microbatches=3)),
    "a class": (
        "{class_path: meshbolt.PipelineParallel, init_args: {size: 2, cuts: [blocks.2]}}",
        PipelineParallel(2, cuts=["blocks.2"]),
    ),
    "blocks": (
        "{size: 2, blocks: blocks, split: [1, 3], replicate: [norm]}",
        PipelineParallel(2, blocks="blocks", split=[1, 3], replicate=["norm"]),
    ),
}
FILE = """
seed_everything: false
trainer:
  strategy:
    class_path: meshbolt.MeshStrategy
    init_args:
      zero: 1
      pipeline_parallel: %s
  accelerator: cpu
  devices: 4
  logger: false
  enable_checkpointing: false
model:
  class_path: meshbolt.demos.ByteGPT
data:
  class_path: meshbolt.demos.PydocText
"""


def built(cli: type[LightningCLI], path: Path, mode: str, *arguments: str) -> Any:
    args = ["--config", str(path), *arguments]
    return cli(run=False, args=args, parser_kwargs={"parser_mode": mode}).trainer.strategy.settings.pipeline_parallel


@pytest.fixture
def without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning warns where both its `args` and the command line are given.
    monkeypatch.setattr("sys.argv", ["meshbolt"])


@pytest.mark.parametrize(("cli", "mode"), [(LightningCLI, "yaml"), (LightningCLI, "omegaconf"), (MeshCLI, "omegaconf")])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("without_arguments")
def test_a_form_is_read_in_every_mode(form: str, cli: type[LightningCLI], mode: str, tmp_path: Path) -> None:
    text, expected = FORMS[form]
    path = tmp_path / "run.yaml"
    path.write_text(FILE % text)
    assert built(cli, path, mode) == expected
    rows = {row.key: row.value for row in explain_plan(load([path]))}
    assert rows["pipeline_parallel.schedule"] == expected.schedule
    assert rows["pipeline_parallel.stages"] == 2
    assert (rows["mesh.pp"], rows["mesh.dp_shard"]) == (2, 2)


@pytest.mark.usefixtures("without_arguments")
def test_the_command_line_says_more_of_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE % "{size: 2, microbatches: 4}")
    more = "--trainer.strategy.pipeline_parallel.schedule=gpipe"
    assert built(MeshCLI, path, "omegaconf", more) == PipelineParallel(2, microbatches=4, schedule="gpipe")
    assert built(MeshCLI, path, "omegaconf", "--trainer.strategy.pipeline_parallel=4") == PipelineParallel(4)
    assert built(MeshCLI, path, "omegaconf", "--trainer.strategy=mesh_3d") == PipelineParallel(2)


def losses(folder: Path) -> list[tuple[float, float]]:
    with next(folder.glob("runs/*/*/metrics.csv")).open() as lines:
        rows = list(csv.DictReader(lines))
    train = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    return [*((loss, 0.0) for loss in train), *((0.0, float(row["val_loss"])) for row in rows if row["val_loss"])]


def fit(folder: Path, *arguments: str) -> str:
    folder.mkdir()
    done = meshbolt_on_ranks("fit", "--config", RECIPE, *SMALL, *SHORT, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_recipe_trains_and_a_model_without_values_trains_alike(tmp_path: Path) -> None:
    said = fit(tmp_path / "later", "--meta=true")
    fit(tmp_path / "at_once", "--meta=false")
    assert "training with ZeRO-1, 2 stages on 2 ranks on 2 × cpu" in said
    found = losses(tmp_path / "later")
    assert found == losses(tmp_path / "at_once")
    assert len(found) > 4


def test_the_recipe_is_verified_from_the_command_line(tmp_path: Path) -> None:
    done = meshbolt(
        "verify", "--config", RECIPE, *SMALL, "--data.length=16", "--draw=plan.svg", cwd=tmp_path, on_warning="error"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ByteGPT, a batch of 4 samples in 4 microbatches: can be cut\n2 stages, ")
    assert "text: pydoc_data.topics" in done.stderr
    assert ElementTree.parse(tmp_path / "plan.svg").getroot().tag.endswith("svg")


@pytest.mark.full
def test_what_is_wrong_in_a_configuration_ends_verify_as_bad_usage(tmp_path: Path) -> None:
    done = meshbolt(
        "verify",
        "--config",
        RECIPE,
        *SMALL,
        "--data.length=16",
        "--trainer.strategy.pipeline_parallel.cuts=[block.1]",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "meshbolt verify: ConfigError:" in done.stderr
    unknown = meshbolt("verify", "--config", RECIPE, "--modell.dim=8", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "modell" in unknown.stderr
