"""The command line as a user calls it: in a process of its own, through either of its doors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SCRIPT = Path(sys.executable).with_name("meshbolt")
TIMEOUT_SECONDS = 150

# A model and a text small enough for a test.
SMALL = (
    "--model.dim=16",
    "--model.num_layers=2",
    "--model.num_heads=2",
    "--model.max_length=16",
    "--data.batch_size=4",
    "--trainer.accelerator=cpu",
)


def meshbolt(
    *arguments: str | Path, cwd: Path, door: str = "module", warnings: str = "default"
) -> subprocess.CompletedProcess[str]:
    """Run the command line.

    Args:
        arguments: from the command on.
        cwd: where it runs; relative paths of a recipe end there.
        door: "script" for the installed `meshbolt`, "module" for `python -m meshbolt`.
        warnings: "error" makes the process fail on a warning.
    """
    command = [str(SCRIPT)] if door == "script" else [sys.executable, "-m", "meshbolt"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": f"{warnings}::UserWarning",
    }
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
