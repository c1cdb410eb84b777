"""How long a background save stalls training, beside one copy of the same state in host memory and a save at once.

    python benchmarks/run_async_save.py --state-gib 1 --ranks 2 --rounds 5

A stack of linear layers is trained in Fabric under ZeRO 3 with AdamW: the state is the weights and two moments, of which each
rank holds its part. In every round, after a barrier, each of these is timed by itself while nothing else runs:

- `copy_new`: one copy of this rank's part into fresh memory (`tensor.clone()`);
- `copy_again`: one copy into memory that was used before (`buffer.copy_`);
- `stall`: `fabric.save` with `Checkpoint(asynchronous=True)`, from the call to its return;
- `write`: from there until the checkpoint is on the disk;
- `at_once`: `fabric.save` as it is without it.

It prints one JSON line per round with the slowest rank's seconds, then one with the medians of all rounds but the first, which
also pays for the buffers, and the ratio that counts: stall / copy_new.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn

from meshbolt import Checkpoint
from meshbolt.compat import local_tensor, tree_leaves
from meshbolt.fabric import MeshStrategy
from meshbolt.testing import run_ranks

GIB = 2**30
WIDTH = 2048


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds of an action that begins on all ranks at once."""
    dist.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class Run:
    """A model that is trained, and whose state is saved."""

    def __init__(self, state_bytes: int, *, asynchronous: bool) -> None:
        strategy = MeshStrategy(zero=3, checkpoint=Checkpoint(asynchronous=asynchronous))
        self.fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
        self.fabric.launch()
        layers = max(1, round(state_bytes / (3 * 4 * WIDTH * WIDTH)))
        module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        self.model, self.optimizer = self.fabric.setup(module, optimizer)
        self.step()

    def step(self) -> None:
        self.fabric.backward(self.model(torch.randn(2, WIDTH)).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, path: Path) -> None:
        self.fabric.save(path, {"model": self.model, "optimizer": self.optimizer})

    def tensors(self) -> list[torch.Tensor]:
        """Return this rank's part of the state."""
        state = [self.model.state_dict(), self.optimizer.state_dict()["state"]]
        return [local_tensor(leaf.detach()) for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def measure(folder: Path, state_bytes: int, rounds: int) -> list[dict[str, float]]:
    """Return the seconds of this rank, by round; and its bytes."""
    background, at_once = (Run(state_bytes, asynchronous=asynchronous) for asynchronous in (True, False))
    strategy: Any = background.fabric.strategy
    buffers = [tensor.clone() for tensor in background.tensors()]
    found = []
    for _ in range(rounds):
        background.step()
        tensors = background.tensors()
        found.append(
            {
                "bytes": sum(tensor.nbytes for tensor in tensors),
                "copy_new": timed(lambda tensors=tensors: [tensor.clone() for tensor in tensors]),  # type: ignore[misc]
                "copy_again": timed(
                    lambda tensors=tensors: [b.copy_(t) for b, t in zip(buffers, tensors, strict=True)]  # type: ignore[misc]
                ),
                "stall": timed(lambda: background.save(folder / "background.ckpt")),
                "write": timed(strategy.wait_for_checkpoint),
                "at_once": timed(lambda: at_once.save(folder / "at_once.ckpt")),
            }
        )
    return found


def main() -> int:
    """Measure on ranks of this machine, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--state-gib", type=float, default=1.0, help="weights and optimizer state of all ranks together"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where checkpoints go for the time; a temporary folder by default")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    state_bytes = int(arguments.state_gib * GIB)
    try:
        ranks = run_ranks(measure, arguments.ranks, folder, state_bytes, arguments.rounds, timeout=1800)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rounds = [{key: max(rank[n][key] for rank in ranks) for key in ranks[0][n]} for n in range(arguments.rounds)]
    for number, values in enumerate(rounds):
        print(json.dumps({"round": number, **{key: round(value, 4) for key, value in values.items()}}))
    later = rounds[1:] or rounds
    medians = {key: statistics.median(values[key] for values in later) for key in rounds[0]}
    summary = {
        "median": {key: round(value, 4) for key, value in medians.items()},
        "stall_per_copy_new": round(medians["stall"] / medians["copy_new"], 3),
        "stall_per_copy_again": round(medians["stall"] / medians["copy_again"], 3),
        "stall_per_at_once": round(medians["stall"] / medians["at_once"], 3),
        "ranks": arguments.ranks,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
