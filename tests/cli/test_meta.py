"""`--meta`: a model is built without its values where it can be, trains the same, and one line says which it was."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml
from tests.cli.support import CONFIGS, SMALL, meshbolt_on_ranks

from meshbolt.cli.main import main

RECIPE = CONFIGS / "gpt_zero2.yaml"
MODELS = """
from meshbolt.demos import ByteGPT

class Reads(ByteGPT):
    def __init__(self, dim: int = 128, num_layers: int = 4, num_heads: int = 4, max_length: int = 128) -> None:
        super().__init__(dim=dim, num_layers=num_layers, num_heads=num_heads, max_length=max_length)
        self.first = float(self.tokens.weight.detach().numpy()[0, 0])
"""
ON_META = re.compile(r"^model: ByteGPT, built on the meta device: (\S+ KiB) of (\S+ KiB) get values", re.MULTILINE)


def losses(folder: Path, *arguments: str) -> tuple[list[str], str]:
    """Train for some steps, and return the losses and all that was said."""
    folder.mkdir()
    (folder / "models.py").write_text(MODELS)
    limits = ("--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1")
    result = meshbolt_on_ranks("fit", "--config", RECIPE, *SMALL, *limits, *arguments, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (metrics,) = folder.glob("runs/*/*/metrics.csv")
    with metrics.open() as lines:
        return [row["train_loss"] for row in csv.DictReader(lines) if row["train_loss"]], result.stdout + result.stderr


def test_a_model_built_without_values_gives_the_losses_of_a_plain_build_to_the_last_digit(tmp_path: Path) -> None:
    by_default, said = losses(tmp_path / "default")
    again, _ = losses(tmp_path / "again", "--meta=true")
    whole, said_whole = losses(tmp_path / "whole", "--meta=false")

    assert len(ON_META.findall(said)) == 1
    assert said_whole.count("model: ByteGPT, built on the CPU, whole on every rank: meta is false.") == 1
    assert len(by_default) == 4
    assert by_default == again == whole
    # Stock Lightning, which knows no such key, can read what was saved, unless somebody has asked for something.
    asked = {
        folder.name: yaml.safe_load(next(folder.glob("runs/*/*/config.yaml")).read_text()).get("meta")
        for folder in tmp_path.iterdir()
    }
    assert asked == {"default": None, "again": True, "whole": False}


def test_a_model_that_needs_values_is_built_with_them_and_the_reason_is_said(tmp_path: Path) -> None:
    wanted, _ = losses(tmp_path / "plain")
    got, said = losses(tmp_path / "reads", "--model=models.Reads", *SMALL[:4], "--model.max_length=16")

    assert re.search(r"model: Reads, built on the CPU, whole on every rank: Reads: numpy\(\) fails on a tensor", said)
    assert len(ON_META.findall(said)) == 0
    assert float(got[0]) == pytest.approx(float(wanted[0]), rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--model=models.Reads"], "Reads: numpy() fails on a tensor that has no values yet"),
        (["--trainer.strategy=ddp"], "the strategy 'ddp' is none of meshbolt's"),
        (["--trainer.strategy.start_method=fork"], "start_method='fork' hands it to other processes"),
    ],
)
def test_where_it_is_insisted_on_what_cannot_be_is_an_error_and_bad_usage(
    arguments: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    settings = ["--trainer.strategy=meshbolt.MeshStrategy", "--trainer.strategy.zero=2"]
    recipe = ["meshbolt", "fit", "--config", str(RECIPE), *settings, *SMALL, "--meta=true", *arguments]
    monkeypatch.setattr("sys.argv", recipe)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")

    assert main() == 2
    said = capsys.readouterr().err
    assert "ConfigError: --meta true asks for a model that is built without its values, but" in said
    assert why in said
