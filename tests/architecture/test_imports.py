"""Who may import whom, and what an import costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGET_SECONDS = 1.0

# CPU time rather than wall time, since other work on the machine must not fail the test.
TIME_IMPORT = """
import time, torch, lightning.pytorch, lightning.fabric
start = time.process_time()
import meshbolt
print(time.process_time() - start)
"""
TIME_HELP = """
import contextlib, io, runpy, sys, time, torch, lightning.pytorch, lightning.fabric
sys.argv = ["meshbolt", "--help"]
start = time.process_time()
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    runpy.run_module("meshbolt", run_name="__main__")
assert "fit" in out.getvalue(), out.getvalue()
print(time.process_time() - start)
"""


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def fastest_of_three(code: str) -> float:
    return min(float(run_python(code)) for _ in range(3))


def test_layers_import_downwards_and_each_outside_package_has_its_door() -> None:
    """A new folder that takes no place in the layers fails this test too."""
    command = shutil.which("lint-imports", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    assert command, "lint-imports is not installed; the extra `dev` has it"
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_importing_meshbolt_costs_under_a_second_beyond_torch_and_lightning() -> None:
    assert fastest_of_three(TIME_IMPORT) < BUDGET_SECONDS


def test_the_help_of_the_command_line_costs_under_a_second_beyond_torch_and_lightning() -> None:
    assert fastest_of_three(TIME_HELP) < BUDGET_SECONDS


def test_importing_meshbolt_initialises_neither_a_process_group_nor_cuda() -> None:
    state = run_python(
        "import meshbolt, torch; print(torch.distributed.is_initialized() or torch.cuda.is_initialized())"
    )
    assert state == "False"
