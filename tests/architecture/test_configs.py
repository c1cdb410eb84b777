"""Every recipe in `configs/` loads, means the same when written out again, and comes to a plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
PRESETS = ("zero0", "zero1", "zero2", "zero3")


def meshbolt(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "meshbolt", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_has_a_recipe(preset: str) -> None:
    assert any(preset in recipe.stem for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_loads_and_means_the_same_when_written_out_again(recipe: Path, tmp_path: Path) -> None:
    written = meshbolt("fit", "--config", recipe, "--print_config")
    copy = tmp_path / recipe.name
    copy.write_text(written)
    assert meshbolt("fit", "--config", copy, "--print_config") == written


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_comes_to_a_plan(recipe: Path) -> None:
    assert "zero" in meshbolt("explain", recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_explains_itself_in_comments(recipe: Path) -> None:
    assert recipe.read_text().startswith("#")
