"""Memory of training under each stage: growth of anonymous resident memory over the process after its imports.

    python benchmarks/run_memory.py --ranks 4 --rounds 3

A model of equal blocks of linear layers is trained in float32 with AdamW and a window of two batches, through the Trainer.
Growth is given in units of the model's size, on rank 0, as the median over rounds: at rest (after a step and zero_grad), and
at its peak (sampled every millisecond).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from run_step_time import _collect, _environment, _rank_environment

MIB = 2**20


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux.")


class Sampler(threading.Thread):
    """Samples the memory of this process every millisecond, and keeps the highest value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.running = True

    def run(self) -> None:
        while self.running:
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
            time.sleep(0.001)


def work(arguments: argparse.Namespace) -> None:
    """Train on this rank and print what it took."""
    import lightning.pytorch as pl
    import torch
    import torch.distributed as dist
    from torch import nn

    import meshbolt

    torch.set_num_threads(1)
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
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    rest: list[int] = []

    class Rest(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if (trainer.fit_loop.total_batch_idx + 1) % 2 == 0:
                trainer.optimizers[0].zero_grad()  # at rest: parameters and optimizer state, no gradients
                time.sleep(0.05)
                rest.append(anonymous_bytes())

    data = torch.utils.data.DataLoader(torch.randn(32 * arguments.ranks, width), batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=arguments.ranks,
        strategy=meshbolt.MeshStrategy(zero=arguments.stage),
        max_steps=6,
        accumulate_grad_batches=2,
        callbacks=[Rest()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, sampler = Module(), Sampler()
    base = anonymous_bytes()
    sampler.start()
    trainer.fit(module, data)
    sampler.running = False
    model_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    result = {
        "model_mib": model_bytes / MIB,
        "rest": (statistics.median(rest) - base) / model_bytes,
        "peak": (sampler.peak_bytes - base) / model_bytes,
        "rank": dist.get_rank(),
    }
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


def main() -> int:
    """Run every stage in fresh processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=2048, help="2048 with 6 blocks is a model of 192 MiB")
    parser.add_argument("--stages", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2, 3])
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        work(arguments)
    print(f"# {_environment()}; {arguments.ranks} ranks, fp32 AdamW, window 2, median of {arguments.rounds} rounds")
    print(f"{'stage':>5} {'model MiB':>10} {'at rest':>8} {'peak':>8}   in model sizes over the process after imports")
    failed = False
    for stage in arguments.stages:
        runs = [_launch(stage, arguments, port=29600 + 10 * stage + index) for index in range(arguments.rounds)]
        done = [run for run in runs if run]
        failed |= len(done) < len(runs)
        if done:
            rest, peak = (statistics.median(run[key] for run in done) for key in ("rest", "peak"))
            print(f"{stage:5} {done[0]['model_mib']:10.0f} {rest:8.2f} {peak:8.2f}", flush=True)
    return int(failed)


def _launch(stage: int, arguments: argparse.Namespace, *, port: int) -> dict[str, Any] | None:
    import tempfile

    started = []
    for rank in range(arguments.ranks):
        # Large blocks go back to the system at once, so that resident memory is what is held.
        environment = {**_rank_environment(rank, arguments.ranks, port), "MALLOC_MMAP_THRESHOLD_": "65536"}
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process's results
        command = [sys.executable, __file__, *sys.argv[1:], "--stage", str(stage)]
        started.append((subprocess.Popen(command, env=environment, stdout=output, stderr=output), output))
    results = [_collect(f"stage {stage}", process, output, 300) for process, output in started]
    return results[0]


if __name__ == "__main__":
    raise SystemExit(main())
