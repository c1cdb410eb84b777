"""Run the demo: train a small GPT under ZeRO-2 on two ranks, go on from its checkpoint, and check what came of it.

It runs `meshbolt fit` as anybody would, and prints each command first. Further arguments go to both, for example
`--trainer.strategy zero3`. The exit code is 0 when the validation loss fell below 2.6 nats per byte and the second run went
on where the first one ended.
"""

from __future__ import annotations

import csv
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CONFIG = "configs/gpt_zero2.yaml"
RUNS = ROOT / "runs" / "gpt_zero2"
CHECKPOINT = "runs/gpt_zero2/checkpoints/last.ckpt"
GOAL_NATS = 2.6


def main(extra: list[str]) -> int:
    """Run both fits and check them."""
    start = time.monotonic()
    common = ["fit", "--config", CONFIG, *devices(), *extra]
    folder = fit(common)
    again = fit([*common, "--trainer.max_epochs", "2", "--ckpt_path", CHECKPOINT])
    first, second = read_metrics(folder / "metrics.csv"), read_metrics(again / "metrics.csv")
    before, after = first["val_loss"][-1][1], second["val_loss"][-1][1]
    ended, resumed = first["train_loss"][-1][0], second["train_loss"][0][0]
    print(f"validation loss {before:.3f} after the first run, {after:.3f} after the second, in nats per byte")
    print(f"the first run logged up to step {ended}, the second from step {resumed}")
    print(f"the demo took {time.monotonic() - start:.0f} s")
    if before >= GOAL_NATS or after >= GOAL_NATS:
        print(f"the validation loss should be below {GOAL_NATS}")
        return 1
    if resumed <= ended:
        print("the second run should have gone on where the first one ended")
        return 1
    return 0


def devices() -> list[str]:
    """Return the arguments for two ranks on this machine: GPUs if there are two, else the CPU."""
    return [] if torch.cuda.device_count() >= 2 else ["--trainer.accelerator", "cpu"]


def fit(arguments: list[str]) -> Path:
    """Run a fit and return the folder it logged to."""
    before = versions()
    print(f"\n$ meshbolt {shlex.join(arguments)}", flush=True)
    script = shutil.which("meshbolt", path=str(Path(sys.executable).parent))
    command = [script] if script else [sys.executable, "-m", "meshbolt"]
    result = subprocess.run([*command, *arguments], cwd=ROOT, check=False)
    if result.returncode:
        sys.exit(result.returncode)
    (folder,) = versions() - before
    return folder


def versions() -> set[Path]:
    """Return the folders of all runs so far."""
    return set(RUNS.glob("version_*"))


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of each loss in a file of Lightning's CSVLogger."""
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    names = ("train_loss", "val_loss")
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)] for name in names}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
