"""`meshbolt verify` says how a model is cut, for the configuration of a run, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshbolt.cli.verify import run
from meshbolt.demos import ByteGPT
from meshbolt.errors import ConfigError

# Lightning calls what jsonargparse 4.49 renamed.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODEL = "class_path: meshbolt.demos.ByteGPT\n  init_args: {dim: 16, num_layers: 4, num_heads: 2, max_length: 16}"
FILE = """
seed_everything: 1
trainer:
  strategy: %s
  accelerator: auto
  devices: 2
  max_epochs: 3
  min_epochs: 2
  fast_dev_run: true
  accumulate_grad_batches: 2
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: runs}}
  callbacks: [{class_path: meshbolt.callbacks.ClosingTable}]
model:
  %s
data:
  class_path: meshbolt.demos.PydocText
  init_args: {batch_size: 8, length: 16}
ckpt_path: %s
"""
MESH = "{class_path: meshbolt.MeshStrategy, init_args: {%s}}"
Verify = Callable[..., tuple[int, str]]


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Verify a run, and return the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    # Lightning leaves the seed in the environment.
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")

    def verified(*arguments: str, strategy: str = "pipeline_parallel", model: str = MODEL) -> tuple[int, str]:
        Path("run.yaml").write_text(FILE % (strategy, model, "last"))
        code = run(["verify", "--pipeline", "--config", "run.yaml", *arguments])
        return code, capsys.readouterr().out

    return verified


def test_a_model_that_can_be_cut_is_told_with_what_its_stages_hold_and_send(verify: Verify, tmp_path: Path) -> None:
    code, said = verify()
    lines = said.splitlines()
    assert code == 0
    assert lines[0] == "ByteGPT, a batch of 8 samples in 4 microbatches: can be cut"
    assert lines[1].startswith("2 stages, the slowest with ")
    assert lines[3] == "    holds tokens, positions, blocks.0-2"
    assert lines[4] == "    sends output of blocks.2: [2, 16, 16] float32, 2,048 bytes"
    assert lines[-3].startswith("equal to the whole module")
    assert lines[-2].startswith("schedule 1f1b: ranks wait ")
    assert lines[-1] == "stages by rank of a pipeline: rank 0: 0; rank 1: 1"
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"], "nothing is written"


def test_json_is_all_that_is_printed_and_says_the_same(verify: Verify) -> None:
    setting = "{size: 2, schedule: interleaved_1f1b, microbatches: 2, split: [1, 1, 1, 1]}"
    code, said = verify("--json", strategy=MESH % f"pipeline_parallel: {setting}")
    answer = json.loads(said)
    assert code == 0
    assert answer["equal"] is True
    assert answer["microbatches"] == 2
    assert answer["cuts"] == ["blocks.1", "blocks.2", "blocks.3"]
    assert [stage["rank"] for stage in answer["stages"]] == [0, 1, 0, 1]
    assert sum(stage["share_of_work"] for stage in answer["stages"]) == pytest.approx(1.0)
    assert answer["stages"][1]["sends"][0]["shape"] == [4, 16, 16]
    assert answer["stages"][3]["sends"] == []
    assert 0 < answer["schedule"]["bubble"] < 1


@pytest.mark.parametrize("strategy", ["zero2", "ddp", MESH % "zero: 3"])
def test_a_strategy_without_a_pipeline_is_asked_for_two_stages(verify: Verify, strategy: str) -> None:
    code, said = verify(strategy=strategy)
    assert code == 0
    assert "\n2 stages," in said


def test_the_command_line_wins_over_the_file(verify: Verify) -> None:
    setting = "--trainer.strategy.pipeline_parallel.cuts=[blocks.1]"
    code, said = verify(setting, "--trainer.precision=64", strategy=MESH % "pipeline_parallel: {size: 2}")
    assert code == 0
    assert "begins with blocks.1" in said
    assert "float64" in said
    assert "at most 1e-12" in said


def test_the_schedule_is_drawn(verify: Verify, tmp_path: Path) -> None:
    code, _ = verify("--draw", "plan.svg")
    picture = (tmp_path / "plan.svg").read_text()
    assert code == 0
    assert picture.startswith("<svg")
    assert "1f1b: 2 stages on 2 ranks, 4 microbatches, bubble" in picture


class Between(ByteGPT):
    """Reads in its last layers what a function outside of modules has made before the first one."""

    def __init__(self) -> None:
        super().__init__(dim=16, num_layers=4, num_heads=2, max_length=16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.tokens(batch[0])
        total = x.sin().mean()
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean() * total


class Manual(ByteGPT):
    """Optimises by itself."""

    def __init__(self) -> None:
        super().__init__(dim=16, num_layers=4, num_heads=2, max_length=16)
        self.automatic_optimization = False


class Counted(nn.Module):
    """A block whose values depend on how many of them were computed, of which a stage sees its own only."""

    def __init__(self, block: nn.Module, seen: list[int]) -> None:
        super().__init__()
        self.block, self.seen = block, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return self.block(x) * len(self.seen)  # type: ignore[no-any-return]


class Counting(ByteGPT):
    """Has blocks that count together."""

    def __init__(self) -> None:
        super().__init__(dim=16, num_layers=4, num_heads=2, max_length=16)
        seen: list[int] = []
        self.blocks = nn.ModuleList(Counted(block, seen) for block in self.blocks)


class Single(ByteGPT):
    """Has one module only."""

    def __init__(self) -> None:
        super().__init__(dim=16, num_layers=1, num_heads=2, max_length=16)
        self.only = nn.Linear(16, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.only(torch.ones(len(batch[0]), 16)).sum()


def own(kind: type) -> str:
    return f"class_path: {__name__}.{kind.__name__}"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Between, "blocks"), (Manual, "automatic_optimization = False"), (Single, "cannot be cut into 2 stages")],
)
def test_a_model_that_cannot_be_cut_is_told_with_the_reason(verify: Verify, kind: type, reason: str) -> None:
    code, said = verify(model=own(kind), strategy="zero1")
    assert code == 1
    assert said.startswith(f"{kind.__name__}, a batch of 8 samples in 4 microbatches: cannot be cut into 2 stages\n")
    assert reason in said.split("\n", 1)[1]
    code, said = verify("--json", model=own(kind))
    assert code == 1
    assert json.loads(said)["can_be_cut"] is False
    assert reason in json.loads(said)["reason"]


def test_stages_that_compute_something_else_are_an_answer_too(verify: Verify) -> None:
    code, said = verify(model=own(Counting))
    assert code == 1
    assert "NOT EQUAL to the whole module" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.strategy.pipeline_parallel.cuts=[block.1]"], r"no module 'block\.1'"),
        (["--trainer.strategy.pipeline_parallel.microbatches=9"], "8 samples cannot be"),
        (["--draw", "nowhere/plan.svg"], "there is no folder nowhere"),
        (["--trainer.strategy=zerro1"], "did you mean 'zero1'"),
    ],
)
def test_a_wrong_configuration_is_bad_usage(verify: Verify, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verify(*arguments, strategy=MESH % "pipeline_parallel: {size: 2}")


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["verify", "--help"])
    assert ended.value.code == 0
    assert "meshbolt verify --config configs/pipeline_parallel.yaml" in " ".join(capsys.readouterr().out.split())
