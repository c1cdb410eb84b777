"""Every recipe can be built by Lightning's command line and by ours, and comes to the plan that `explain` shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from tests.cli.support import CONFIGS

from meshbolt import MeshStrategy
from meshbolt.callbacks import LogProgress
from meshbolt.cli.planned import explain_plan
from meshbolt.cli.train import MeshCLI
from meshbolt.config.load import load

RECIPES = sorted(CONFIGS.glob("*.yaml"))
ON_CPU = "--trainer.accelerator=cpu"
Build = Callable[..., Any]

pytestmark = [
    pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem),
    # Lightning calls what jsonargparse 4.49 renamed.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Build all that a recipe names, without running it."""
    # Lightning warns where both its `args` and the command line are given, and leaves the seed in the environment.
    monkeypatch.setattr("sys.argv", ["meshbolt"])
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")

    def made(cli: type[LightningCLI], recipe: Path, *arguments: str, mode: str) -> Any:
        if mode == "omegaconf+":
            jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        args = ["--config", str(recipe), ON_CPU, *arguments]
        return cli(run=False, args=args, parser_kwargs={"parser_mode": mode})

    return made


@pytest.mark.parametrize(
    ("cli", "mode"), [(LightningCLI, "omegaconf"), (MeshCLI, "omegaconf"), (MeshCLI, "omegaconf+")]
)
def test_a_recipe_builds_a_trainer_with_the_strategy_that_explain_shows(
    recipe: Path, build: Build, cli: type[LightningCLI], mode: str
) -> None:
    built = build(cli, recipe, mode=mode)
    rows = {row.key: row.value for row in explain_plan(load([recipe], overrides=[("trainer.accelerator", "cpu")]))}
    strategy, zero = built.trainer.strategy, built.trainer.strategy.settings.zero

    assert type(strategy) is MeshStrategy
    assert isinstance(built.model, pl.LightningModule)
    assert isinstance(built.datamodule, pl.LightningDataModule)
    assert (zero.stage, zero.replicate, zero.unit) == (rows["zero.stage"], rows["zero.replicate"], rows["zero.unit"])
    assert strategy.settings.recompute.mode == rows["recompute.mode"]
    assert strategy.num_processes == rows["world_size"]
    assert strategy.precision_plugin.policy(reduce_dtype="auto").flag == rows["precision.flag"]


def test_a_recipe_without_references_loads_in_lightnings_own_mode_too(recipe: Path, build: Build) -> None:
    if "${" in recipe.read_text():
        pytest.skip("refers to another value, which the plain mode does not do")

    assert type(build(LightningCLI, recipe, mode="yaml").trainer.strategy) is MeshStrategy


def test_our_command_line_adds_progress_that_a_log_file_can_hold(recipe: Path, build: Build) -> None:
    assert type(build(MeshCLI, recipe, mode="omegaconf").trainer.progress_bar_callback) is LogProgress


def test_our_command_line_leaves_another_choice_of_progress_alone(recipe: Path, build: Build) -> None:
    chosen = build(MeshCLI, recipe, "--trainer.callbacks+=TQDMProgressBar", mode="omegaconf")
    none = build(MeshCLI, recipe, "--trainer.enable_progress_bar=false", mode="omegaconf")

    assert type(chosen.trainer.progress_bar_callback).__name__ == "TQDMProgressBar"
    assert none.trainer.progress_bar_callback is None


def test_a_recipe_says_in_its_head_how_to_run_it(recipe: Path) -> None:
    head = [line for line in recipe.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]

    assert f"#   meshbolt fit --config configs/{recipe.name}" in head
    assert yaml.safe_load(recipe.read_text())["trainer"]["devices"] >= 2
