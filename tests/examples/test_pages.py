"""Programs in the pages for those who come from elsewhere run from start to end, on CPU ranks instead of GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.rows import full

import meshbolt
from meshbolt.plugins import HalfPrecision, MixedPrecision

SETTINGS = {
    name: getattr(meshbolt, name)
    for name in ("Zero", "Offload", "TensorParallel", "PipelineParallel", "Recompute", "Checkpoint", "MeshStrategy")
} | {"MixedPrecision": MixedPrecision, "HalfPrecision": HalfPrecision}
DOCS = Path(__file__).parents[2] / "docs"
PROGRAM = re.compile(r"<!-- run on (\d+) ranks -->\n```python\n(.*?)```", re.DOTALL)
PROGRAMS = [
    (full if int(ranks) > 2 else pytest.param)(int(ranks), code, id=f"{page.stem}-{number}")
    for page in sorted(DOCS.glob("from_*.md"))
    for number, (ranks, code) in enumerate(PROGRAM.findall(page.read_text(encoding="utf-8")))
]
LIMIT_SECONDS = 240
SETTING = re.compile(rf"`((?:[a-z_]+=)?(?:{'|'.join(SETTINGS)})\([^`]*\))`")


def test_every_page_has_a_program_that_runs() -> None:
    assert {"from_accelerate", "from_fsdp", "from_megatron"} == {str(row.id).partition("-")[0] for row in PROGRAMS}


@pytest.mark.parametrize("page", sorted(DOCS.glob("from_*.md")), ids=lambda page: page.stem)
def test_settings_in_the_tables_can_be_made(page: Path) -> None:
    found = [
        call for call in SETTING.findall(page.read_text(encoding="utf-8")) if "..." not in call and "·" not in call
    ]
    assert found
    for call in found:
        eval(call.partition("=")[2] if call[0].islower() else call, {**SETTINGS, "machines": 2})


@pytest.mark.timeout(LIMIT_SECONDS + 30)
@pytest.mark.parametrize(("ranks", "code"), PROGRAMS)
def test_a_program_of_a_page_runs_to_its_end(ranks: int, code: str, tmp_path: Path) -> None:
    assert code.count("devices=8") == 1
    code = code.replace("devices=8", f'accelerator="cpu", devices={ranks}').replace(
        "DATA_PARALLEL = 2", "DATA_PARALLEL = 1"
    )
    (program := tmp_path / "train.py").write_text(code)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
