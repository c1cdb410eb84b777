"""Every program in `examples/` runs from start to end on a CPU, as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.rows import full

EXAMPLES = Path(__file__).parents[2] / "examples"
# Eight ranks, of which each has a process that imports torch.
WIDE = frozenset({"mesh_3d.py"})
LIMIT_SECONDS, LIMIT_OF_WIDE_SECONDS = 120, 300
PROGRAMS = [
    full(path, id=path.name) if path.name in WIDE else pytest.param(path, id=path.name)
    for path in sorted(EXAMPLES.rglob("*.py"))
]


@pytest.mark.timeout(LIMIT_OF_WIDE_SECONDS + 30)
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_example_runs_to_its_end_without_a_warning(program: Path, tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_OF_WIDE_SECONDS if program.name in WIDE else LIMIT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stderr, result.stderr
