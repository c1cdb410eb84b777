"""One script under DeepSpeed itself and under meshbolt, with nothing but its import changed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.ranks.initialize_support import config
from tests.rows import full

SCRIPT = Path(__file__).parent / "deepspeed_script.py"
THEIRS, OURS = "import deepspeed\n", "from meshbolt import deepspeed\n"
SAMPLES, LIMIT_SECONDS = 3, 400


def run(folder: Path, name: str, block: dict[str, Any], *arguments: str, port: int) -> list[dict[str, Any]]:
    """Run the script under one of the two on two ranks, and return what each rank has told."""
    own = folder / name
    own.mkdir(exist_ok=True)
    text = SCRIPT.read_text()
    assert text.count(THEIRS) == 1
    (own / "script.py").write_text(text if name == "theirs" else text.replace(THEIRS, OURS))
    (own / "config.json").write_text(json.dumps(block))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={port}",
        "script.py",
    ]
    command += ["--deepspeed_config", "config.json", "--folder", str(own), *arguments]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        command, cwd=own, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return [json.loads((own / f"told_{rank}.json").read_text()) for rank in range(2)]


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], *, norms: bool) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("losses", "rates", *(("norms",) if norms else ())):
            assert mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key
        assert (mine["numbers"], mine["stage"]) == (other["numbers"], other["stage"])


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.timeout(5 * LIMIT_SECONDS)
@pytest.mark.parametrize(
    ("stage", "window", "clip", "client"),
    [
        full(0, 2, 0.3, False),
        full(1, 2, 0.3, False),
        full(2, 2, 0.3, False),
        full(3, 2, 0.3, False),
        full(2, 1, 0.0, False),
        full(3, 3, 0.0, True),
        full(1, 1, 0.5, True),
    ],
)
def test_a_script_of_deepspeeds_trains_alike_and_goes_on_from_its_checkpoint(
    stage: int, window: int, clip: float, client: bool, tmp_path: Path
) -> None:
    # torch_adam: DeepSpeed would compile a kernel of its own first.
    adam = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
    block = config(stage, window=window, clip=clip, steps_per_print=10**9, optimizer=adam)
    if client:
        del block["optimizer"]
        block["zero_allow_untested_optimizer"] = True
    arguments = ["--client"] if client else []
    port = 20000 + os.getpid() % 20000
    theirs = run(tmp_path, "theirs", block, *arguments, port=port)
    ours = run(tmp_path, "ours", block, *arguments, port=port + 1)
    # Stage 0 without a precision block keeps no norm there.
    compare(ours, theirs, norms=stage > 0)
    again = run(tmp_path, "ours", block, *arguments, "--resume", port=port + 2)
    theirs_again = run(tmp_path, "theirs", block, *arguments, "--resume", port=port + 3)
    compare(again, theirs_again, norms=stage > 0)
    # And from what DeepSpeed has saved.
    imported = tmp_path / "imported"
    shutil.copytree(tmp_path / "theirs", imported)
    compare(run(tmp_path, "imported", block, *arguments, "--resume", port=port + 4), theirs_again, norms=stage > 0)
