"""The command line as a user calls it, in a process of its own through either of its doors; and on ranks that are there."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

from meshbolt.cli.main import main
from meshbolt.testing import run_ranks

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
    *arguments: str | Path, cwd: Path, door: str = "module", on_warning: str = "default"
) -> subprocess.CompletedProcess[str]:
    """Run the command line.

    Args:
        arguments: from the command on.
        cwd: where it runs; relative paths of a recipe end there.
        door: "script" for the installed `meshbolt`, "module" for `python -m meshbolt`.
        on_warning: "error" makes the process fail on a warning.
    """
    command = [str(SCRIPT)] if door == "script" else [sys.executable, "-m", "meshbolt"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": f"{on_warning}::UserWarning",
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


def meshbolt_on_ranks(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line on two forked ranks, as torchrun would, without importing torch again; of rank 0 the output.

    Args:
        arguments: from the command on.
        cwd: where it runs, and where models are found.
    """
    words = ["meshbolt", *map(str, arguments)]
    codes = run_ranks(_command, 2, words, str(cwd), timeout=TIMEOUT_SECONDS)
    out, err = ((cwd / f"rank0.{name}").read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(words, max(codes), stdout=out, stderr=err)


def _command(words: list[str], cwd: str) -> int:
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = words
    warnings.resetwarnings()  # what is an error in a test is not one for a user
    for number, name in ((1, "out"), (2, "err")):
        with Path(f"rank{os.environ['RANK']}.{name}").open("w") as file:
            os.dup2(file.fileno(), number)
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:  # not one of pytest's
                handler.setStream(sys.stderr)  # it was made for the parent's
    try:
        return main()
    except SystemExit as ended:
        return int(ended.code or 0)
