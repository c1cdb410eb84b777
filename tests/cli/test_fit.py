"""`meshbolt fit` from start to end: two ranks, a log file, a checkpoint, and going on from it through the other door."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.cli.support import CONFIGS, SMALL, meshbolt, meshbolt_on_ranks

from meshbolt.cli.main import main

RECIPE = CONFIGS / "gpt_zero2.yaml"
SHORT = ("--trainer.limit_train_batches=6", "--trainer.limit_val_batches=2", "--trainer.val_check_interval=3")
MORE = ("--trainer.log_every_n_steps=1", "--model.warmup_steps=1", "--model.learning_rate=0.01")
CHECKPOINT = "runs/gpt_zero2/checkpoints/last.ckpt"


@dataclass(frozen=True)
class Run:
    """What a run of two ranks left behind."""

    folder: Path
    out: str
    err: str

    def metrics(self, version: int) -> list[dict[str, str]]:
        with (self.folder / "runs" / "gpt_zero2" / f"version_{version}" / "metrics.csv").open() as lines:
            return list(csv.DictReader(lines))

    def losses(self, version: int) -> dict[int, float]:
        return {int(row["step"]): float(row["train_loss"]) for row in self.metrics(version) if row["train_loss"]}


def fit(folder: Path, *arguments: str, door: str) -> Run:
    result = meshbolt(
        "fit", "--config", RECIPE, *SMALL, *SHORT, *MORE, *arguments, cwd=folder, door=door, on_warning="error"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return Run(folder, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tmp_path_factory.mktemp("fit"), door="script")


@pytest.fixture(scope="module")
def resumed(first: Run) -> Run:
    return fit(first.folder, "--trainer.max_epochs=2", f"--ckpt_path={CHECKPOINT}", door="module")


def test_one_rank_speaks_and_says_every_line_once(first: Run) -> None:
    lines = first.out.splitlines()

    assert sum(line.startswith("training with ZeRO-2 on 2 × cpu") for line in lines) == 1
    assert sum(line.startswith("text: pydoc_data.topics") for line in lines) == 1
    assert sum(line.startswith("sample:") for line in lines) == 1
    assert sum(line.startswith("this run") for line in lines) == 1


def test_the_log_shows_steps_and_losses_as_plain_text(first: Run) -> None:
    assert re.search(r"^validation before training \| val_loss 5\.\d+$", first.out, re.MULTILINE)
    assert re.search(r"^training \| step 1 of 6 \|.* train_loss \d", first.out, re.MULTILINE)
    assert re.search(r"^training \| step 6 of 6 \|.* tokens/s", first.out, re.MULTILINE)
    assert re.search(r"^validation at step 6 \|.* val_loss \d", first.out, re.MULTILINE)
    assert "\x1b" not in first.out + first.err
    assert "\r" not in first.out + first.err


def test_the_closing_table_has_what_was_run(first: Run) -> None:
    rows = dict(re.findall(r"^  (\w.*?)  +(\S.*)$", first.out.rpartition("this run\n")[2], re.MULTILINE))

    assert rows["strategy"] == "ZeRO-2"
    assert rows["ranks"] == "2 × cpu"
    assert rows["steps"] == "6"
    assert "tokens/s, all ranks" in rows
    assert re.fullmatch(r"\S+ MiB least, \S+ MiB mean, \S+ MiB most", rows["peak memory of a rank (process)"])


def test_it_learns(first: Run) -> None:
    losses = list(first.losses(0).values())

    assert losses[-1] < losses[0] - 0.05


def test_nothing_is_said_that_the_user_can_do_nothing_about(first: Run, resumed: Run) -> None:
    for run in (first, resumed):
        assert "deprecated" not in run.err
        assert "Warning" not in run.err


def test_the_second_run_goes_on_where_the_first_one_ended(first: Run, resumed: Run) -> None:
    assert list(resumed.losses(1)) == list(range(6, 12))
    before, after = first.metrics(0), resumed.metrics(1)
    val_before = [float(row["val_loss"]) for row in before if row["val_loss"]]
    shown = re.search(r"^validation before training \| val_loss (\S+)$", resumed.out, re.MULTILINE)

    assert shown is None or float(shown[1]) == pytest.approx(val_before[-1], abs=2e-4)
    assert "training with ZeRO-2 on 2 × cpu, from step 6" in resumed.out
    assert [int(row["step"]) for row in after if row["val_loss"]] == [8, 11]


def test_a_run_that_was_interrupted_learns_what_one_without_a_break_learns(resumed: Run, tmp_path: Path) -> None:
    whole = fit(tmp_path, "--trainer.max_epochs=2", door="module")
    expected = {step: loss for step, loss in whole.losses(0).items() if step >= 6}

    assert resumed.losses(1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_other_commands_run_on_the_checkpoint(first: Run, command: str) -> None:
    limit = f"--trainer.limit_{'val' if command == 'validate' else command}_batches=2"
    arguments = ("--config", RECIPE, *SMALL, limit, f"--ckpt_path={CHECKPOINT}")
    result = meshbolt_on_ranks(command, *arguments, cwd=first.folder)

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--trainer.strategy=zero4", "ConfigError: trainer.strategy='zero4' is not a strategy (did you mean 'zero3'?"),
        ("--trainer.strategy=meshbolt.MeshStrategy", "write `class_path: meshbolt.MeshStrategy` below `strategy:`"),
        ("--trainer.no_such_option=1", "no_such_option"),
        ("--model.no_such_option=1", "no_such_option"),
        (
            '--trainer.strategy={"class_path": "meshbolt.MeshStrategy", "init_args": {"offload": "nvme"}}',
            "Offload(optimizer='nvme') needs a directory",
        ),
        ('--trainer.strategy={"class_path": "meshbolt.MeshStrategy", "init_args": {"zeroo": 2}}', "zeroo"),
    ],
)
def test_bad_usage_is_exit_code_2_and_names_what_is_wrong_before_ranks_are_started(
    argument: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As under `python -m meshbolt`: the name of the file is of no use to anybody.
    monkeypatch.setattr("sys.argv", ["__main__.py", "fit", "--config", str(RECIPE), *SMALL, argument])
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")
    try:
        code = main()
    except SystemExit as ended:
        code = int(ended.code or 0)

    assert code == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "__main__" not in shown


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return meshbolt_on_ranks("fit", "--config", RECIPE, *SMALL, *SHORT, *arguments, cwd=folder)


def test_ranks_that_do_not_fit_the_strategy_end_with_an_error_and_not_with_a_hang(tmp_path: Path) -> None:
    settings = {"class_path": "meshbolt.MeshStrategy", "init_args": {"zero": {"stage": 3, "replicate": 3}}}
    result = run(tmp_path, f"--trainer.strategy={json.dumps(settings)}")

    assert result.returncode == 2, result.stdout + result.stderr
    assert "meshbolt fit: TopologyError: zero=Zero(replicate=3)" in result.stderr


def test_a_checkpoint_that_is_not_there_is_exit_code_1_and_named(tmp_path: Path) -> None:
    result = run(tmp_path, "--ckpt_path=absent.ckpt")

    assert result.returncode == 1, result.stdout + result.stderr
    assert "absent.ckpt" in result.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_help_of_fit_begins_with_its_usage_and_ends_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["meshbolt", "fit", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out

    assert ended.value.code == 0
    assert shown.startswith("usage: meshbolt fit --config FILE")
    assert shown.rstrip().endswith("example: meshbolt fit --config configs/gpt_zero2.yaml --trainer.devices 2")
    # What `--meta` does with each of its values.
    assert "--meta" in shown
    assert "is what it would be on the CPU" in " ".join(shown.split())
