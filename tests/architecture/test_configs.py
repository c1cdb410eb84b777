"""Every recipe in `configs/` loads, means the same when written out again, and comes to a plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
PRESETS = ("zero0", "zero1", "zero2", "zero3", "tensor_parallel", "pipeline_parallel", "mesh_3d")

# One process a recipe for three commands: most of what a command costs is importing torch.
PROGRAM = """
import contextlib, io, runpy, sys

def meshbolt(*arguments):
    sys.argv = ["meshbolt", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module("meshbolt", run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{arguments} ended with {end.code}"
    return out.getvalue()

recipe, copy = sys.argv[1:]
written = meshbolt("fit", "--config", recipe, "--print_config")
assert "strategy" in written, written
with open(copy, "w") as file:
    file.write(written)
again = meshbolt("fit", "--config", copy, "--print_config")
assert again == written, again
print(meshbolt("explain", recipe))
"""


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_has_a_recipe(preset: str) -> None:
    assert any(preset in recipe.stem for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_loads_means_the_same_when_written_out_again_and_comes_to_a_plan(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(recipe), str(tmp_path / recipe.name)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "zero" in result.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_explains_itself_in_comments(recipe: Path) -> None:
    assert recipe.read_text().startswith("#")
