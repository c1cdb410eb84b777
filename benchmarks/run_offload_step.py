"""Steps of training with optimizer state in a file, beside what disk and processor need at least.

    python benchmarks/run_offload_step.py --folder /path/on/the/disk --rounds 3 --timeline timeline.json

A model of equal blocks of linear layers is trained in float32 with AdamW through the Trainer, on few samples, so that a step is
mostly the update. In every round, in one process of its own, one after the other:

- `memory`: steps with `Offload("cpu")`: how long an update takes where state is in memory.
- `file`: steps with `Offload("nvme")`.

Before each and in the end our file engine reads one half of a file and writes the other, at the same time, twice: the bandwidth.

It prints a JSON line for each round: the median seconds that a step waits for its update, in memory and in the file; all bytes
that a step reads and writes over the better bandwidth of those measured right before and after `file`; and the seconds of
`file` over the larger of the two bounds. A few chunks of each step are read ahead and written beside forward and backward passes,
and not in the seconds: `without what is hidden` is the ratio if those were three chunks, as many as there can be. A round is not
`steady` where the bandwidths differ by more than a fifth. `--timeline` writes what was under way when in the last three steps,
for https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from run_file_engine import MIB, Ours
from run_step_time import _collect, _environment, _rank_environment

SKIPPED, TRACED, STEADY = 2, 3, 1.2


def work(arguments: argparse.Namespace) -> None:
    """Measure one round, and print what was found."""
    import torch

    from meshbolt import Offload

    torch.set_num_threads(arguments.threads)
    num_bytes = 8 * 2 * arguments.blocks * (arguments.width**2 + arguments.width) // (128 * MIB) * (128 * MIB)
    ours = Ours(arguments.folder, num_bytes, 2 * MIB, 4)
    rates = [bandwidth(ours)]
    memory = train(Offload("cpu"), arguments)
    rates.append(bandwidth(ours))
    in_file = train(Offload("nvme", path=arguments.folder), arguments)
    rates.append(bandwidth(ours))
    ours.file.close()
    disk_seconds = in_file["bytes"] / max(rates[1:])
    shown_seconds = disk_seconds * in_file["in_step"]
    result = {
        "bandwidth_mib": [round(value / MIB) for value in rates],
        "steady": max(rates[1:]) / min(rates[1:]) < STEADY,
        "bytes_mib": round(in_file["bytes"] / MIB),
        "disk_seconds": round(disk_seconds, 3),
        "memory_seconds": round(memory["seconds"], 3),
        "file_seconds": round(in_file["seconds"], 3),
        "file over bound": round(in_file["seconds"] / max(disk_seconds, memory["seconds"]), 3),
        "without what is hidden": round(in_file["seconds"] / max(shown_seconds, memory["seconds"]), 3),
        "whole step, memory and file": [round(memory["step_seconds"], 3), round(in_file["step_seconds"], 3)],
    }
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


def bandwidth(ours: Ours) -> float:
    """Return the bytes per second of reads and writes together."""
    return max(ours.run("both") for _ in range(2))


def train(offload: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Train a few steps, and return medians of them."""
    import time

    import lightning.pytorch as pl
    import torch
    from torch import nn

    import meshbolt
    from meshbolt.monitoring.trace import TraceSpan, write_trace

    blocks, width = arguments.blocks, arguments.width

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks: nn.ModuleList | None = None

        def configure_model(self) -> None:
            if self.blocks is None:
                layers = (
                    nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(blocks)
                )
                self.blocks = nn.ModuleList(layers)

        def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
            for block in self.blocks or ():
                batch = batch + block(batch)
            return batch.square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return getattr(torch.optim, arguments.optimizer)(self.parameters(), lr=1e-5)  # type: ignore[no-any-return]

    spans: list[TraceSpan] = []
    waits: list[float] = []
    moved: list[int] = []
    ends: list[float] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.engine = trainer.strategy.engine  # type: ignore[attr-defined]
            self.before = self.engine.offload_traffic()

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            now = self.engine.offload_traffic()
            done, self.before = now - self.before, now
            waits.append(done.step_wait_seconds)
            moved.append(done.state.read.num_bytes + done.state.written.num_bytes)
            ends.append(time.perf_counter())
            if trainer.global_step == arguments.steps - TRACED:
                self.engine.observe_offload(lambda *span: spans.append(TraceSpan(*span)))

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=meshbolt.MeshStrategy(zero=3, offload=offload),
        max_steps=arguments.steps,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(torch.randn(2 * arguments.steps, width), batch_size=2)
    trainer.fit(Module(), data)
    if arguments.timeline is not None and spans:
        write_trace(arguments.timeline, spans, rank=0, lanes=["file: read", "updates", "file: write"])
    num_bytes = statistics.median(moved[SKIPPED:])
    chunk = min(64 * MIB, 8 * 2 * (width**2 + width))
    hidden = min(num_bytes, 3 * chunk)
    return {
        "seconds": statistics.median(waits[SKIPPED:]),
        "step_seconds": statistics.median([b - a for a, b in zip(ends[SKIPPED:], ends[SKIPPED + 1 :], strict=False)]),
        "bytes": num_bytes,
        "in_step": 1.0 - hidden / num_bytes if num_bytes else 1.0,
    }


def main() -> int:
    """Run the rounds in fresh processes, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to use")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=2048, help="2048 with 12 blocks has 101 million parameters")
    parser.add_argument("--threads", type=int, default=1, help="of torch's operations")
    parser.add_argument("--optimizer", default="AdamW", help="RAdam updates about as long as the disk takes")
    parser.add_argument("--timeline", type=Path, help="file to write for the steps of the last round")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
    print(
        f"# {_environment()}; fp32 {arguments.optimizer}, {arguments.blocks} blocks of {arguments.width}, "
        f"{arguments.threads} threads"
    )
    found = [_round(arguments) for _ in range(arguments.rounds)]
    for name in ("file over bound", "without what is hidden"):
        if ratios := [row[name] for row in found if row]:
            print(json.dumps({f"median {name}": statistics.median(ratios)}))
    return int(None in found)


def _round(arguments: argparse.Namespace) -> dict[str, Any] | None:
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process's results
    options = {
        name: getattr(arguments, name) for name in ("steps", "blocks", "width", "threads", "optimizer", "timeline")
    }
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--work", "--folder", str(folder), *words]
    environment = {**_rank_environment(0, 1, 29900 + os.getpid() % 90), "OMP_NUM_THREADS": str(arguments.threads)}
    try:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        row = _collect("a round", process, output, 300)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
