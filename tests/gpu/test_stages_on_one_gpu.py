"""Every stage on one GPU trains as a plain loop does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshbolt.testing import needs

pytestmark = needs(gpus=1)
PROGRAM = Path(__file__).with_name("program.py")
LIMIT_SECONDS = 150


def run_program(*arguments: str) -> str:
    """Run it in a process of its own: a CUDA context and NCCL's threads outlive a test."""
    command = [sys.executable, str(PROGRAM), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_on_one_gpu_trains_as_a_plain_loop_does(stage: int) -> None:
    assert run_program(f"zero{stage}", "32-true", "gpu", "1").count("equal") == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_on_one_gpu_keeps_float32_shards_and_stays_near_the_plain_loop(precision: str) -> None:
    assert run_program("zero3", precision, "gpu", "1").count("near") == 1
