"""An optimizer whose state lies in host memory or in a file trains on a GPU as a plain loop does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.gpu.test_stages_on_one_gpu import run_program

from meshbolt.testing import needs

pytestmark = needs(gpus=1)


@pytest.mark.parametrize("strategy", ["zero2_offload", "zero3_offload"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_state_in_host_memory(strategy: str, precision: str) -> None:
    word = "equal" if precision == "32-true" else "near"
    assert run_program(strategy, precision, "gpu", "1").count(word) == 1


@pytest.mark.parametrize("strategy", ["zero_infinity", "hosted", "hosted_unlocked", "hosted_nvme", "auto", "auto_nvme"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_parameters_elsewhere(strategy: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHBOLT_NVME_PATH", str(tmp_path))
    word = "equal" if precision == "32-true" else "near"
    assert run_program(strategy, precision, "gpu", "1").count(word) == 1
