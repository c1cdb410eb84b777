"""Memory of training with optimizer state in a file: what it takes beside parameters, gradients and activations.

    python benchmarks/run_offload_memory.py --folder /path/on/the/disk --ranks 1 2

A model of equal blocks of linear layers is trained in float32 under ZeRO 3 through the Trainer, saves a checkpoint, and goes on
from it in a new process. What is measured is the growth of anonymous resident memory over the process after its imports, at its
peak (sampled every millisecond) in each phase: `train` (steps after the first), `save` and `load`.

`sgd` has no state at all: it is the memory of parameters, gradients and activations. `nvme` is AdamW with
`Offload("nvme")`, `cpu` with `Offload("cpu")`. What is above `sgd` in the same phase is what the state takes, and for `nvme` it
is to be at most four chunks of 64 MiB, whatever the size of the state.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from run_memory import MIB, anonymous_bytes
from run_step_time import _collect, _environment, _rank_environment

KINDS = ("sgd", "cpu", "nvme")
PHASES = ("train", "save", "load")


class Sampler(threading.Thread):
    """Samples the memory of this process every millisecond, and keeps the highest value of each phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self.phase = "before"

    def run(self) -> None:
        while self.phase != "over":
            phase, value = self.phase, anonymous_bytes()
            self.peaks[phase] = max(self.peaks.get(phase, 0), value)
            time.sleep(0.001)


def work(arguments: argparse.Namespace) -> None:
    """Train on this rank and print what it took."""
    import lightning.pytorch as pl
    import torch
    import torch.distributed as dist
    from torch import nn

    import meshbolt

    torch.set_num_threads(1)
    blocks, width, kind = arguments.blocks, arguments.width, arguments.kind
    path, sampler = arguments.folder / f"{kind}.ckpt", Sampler()

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
            if kind == "sgd":
                return torch.optim.SGD(self.parameters(), lr=1e-5)
            return torch.optim.AdamW(self.parameters(), lr=1e-5)

    class Phases(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            sampler.phase = "first step"

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            sampler.phase = "train"
            if arguments.part == "save" and trainer.global_step == 4:
                sampler.phase = "save"
                trainer.save_checkpoint(path)
                sampler.phase = "train"

    offload = {"sgd": None, "cpu": "cpu", "nvme": meshbolt.Offload("nvme", path=arguments.folder)}[kind]
    strategy = meshbolt.MeshStrategy(zero=3, offload=offload)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=arguments.world,
        strategy=strategy,
        max_steps=6 if arguments.part == "save" else 8,
        callbacks=[Phases()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    load = strategy.load_checkpoint

    def watched_load(*args: Any, **kwargs: Any) -> Any:
        sampler.phase = "load"
        return load(*args, **kwargs)

    strategy.load_checkpoint = watched_load  # type: ignore[method-assign]
    data = torch.utils.data.DataLoader(torch.randn(32 * arguments.world, width), batch_size=2)
    module, base = Module(), anonymous_bytes()
    sampler.start()
    trainer.fit(module, data, ckpt_path=path if arguments.part == "load" else None)
    sampler.phase = "over"
    result = {
        "model_mib": 2 * blocks * (width * width + width) * 4 / MIB,
        "rank": dist.get_rank(),
        **{phase: (peak - base) / MIB for phase, peak in sampler.peaks.items()},
    }
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


def main() -> int:
    """Run each kind in fresh processes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to use")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=2048, help="2048 with 12 blocks is a model of 384 MiB")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    for name, of in (("world", int), ("kind", str), ("part", str)):
        parser.add_argument(f"--{name}", type=of, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind is not None:
        work(arguments)
    print(
        f"# {_environment()}; fp32, ZeRO 3, {arguments.blocks} blocks of {arguments.width}; MiB over the process after imports"
    )
    failed = False
    for world in arguments.ranks:
        found = {kind: measure(kind, world, arguments) for kind in arguments.kinds}
        failed |= any(row is None for row in found.values())
        report(world, {kind: row for kind, row in found.items() if row})
    return int(failed)


def measure(kind: str, world: int, arguments: argparse.Namespace) -> dict[str, float] | None:
    """Return the peaks of a kind, the highest of all ranks."""
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        rows: list[dict[str, Any] | None] = []
        for part in ("save", "load"):
            rows += _launch(kind, world, part, folder, arguments)
    finally:
        shutil.rmtree(folder)
    if any(row is None for row in rows):
        return None
    return {key: max(row[key] for row in rows if row and key in row) for key in ("model_mib", *PHASES)}


def report(world: int, found: dict[str, dict[str, float]]) -> None:
    """Print a line for each kind."""
    for kind, row in found.items():
        line: dict[str, Any] = {"ranks": world, "kind": kind, **{key: round(value) for key, value in row.items()}}
        if kind != "sgd" and "sgd" in found:
            line["state takes"] = {phase: round(row[phase] - found["sgd"][phase]) for phase in PHASES}
        print(json.dumps(line), flush=True)


def _launch(
    kind: str, world: int, part: str, folder: Path, arguments: argparse.Namespace
) -> list[dict[str, Any] | None]:
    started = []
    port = 29700 + os.getpid() % 200
    for rank in range(world):
        # Large blocks go back to the system at once, so that resident memory is what is held.
        environment = {**_rank_environment(rank, world, port), "MALLOC_MMAP_THRESHOLD_": "65536"}
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process's results
        options = {"folder": folder, "world": world, "kind": kind, "part": part}
        options |= {"blocks": arguments.blocks, "width": arguments.width}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, __file__, *words]
        started.append((subprocess.Popen(command, env=environment, stdout=output, stderr=output), output))
    return [_collect(f"{kind}, {part}", process, output, 300) for process, output in started]


if __name__ == "__main__":
    raise SystemExit(main())
