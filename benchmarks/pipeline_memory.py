"""What a rank of `run_pipeline_memory.py` does: build a GPT in one of several ways, train it a little, and print what it took."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from gpt import GPT, Block, loss_of
from run_memory import anonymous_bytes
from torch import Tensor, nn

import meshbolt
from meshbolt.cli.main import main as command_line
from meshbolt.pipeline.taint import is_foreign

SMALL = {"layers": 4, "width": 32, "vocabulary": 256}
M_MMAP_THRESHOLD = -3


class _Counts(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def block_bytes() -> int:
    """Return the bytes of the blocks that come straight from the system: of large tensors, and little else."""
    count = ctypes.CDLL(None).mallinfo2
    count.restype = _Counts
    return int(count().hblkhd)


class Watch(threading.Thread):
    """Samples both measures every millisecond, and keeps the highest values."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = self.now()
        self.running = True

    @staticmethod
    def now() -> tuple[int, int]:
        """Return resident bytes and bytes in large blocks."""
        return anonymous_bytes(), block_bytes()

    def run(self) -> None:
        while self.running:
            self.peak = tuple(map(max, self.peak, self.now()))  # type: ignore[assignment]
            time.sleep(0.001)

    def grown(self, then: tuple[int, int]) -> list[int]:
        """Return by how much the measures were higher than at the beginning."""
        return [later - before for later, before in zip(then, self.before, strict=True)]


class Live:
    """Counts the graphs that are alive of those that have passed by here."""

    def __init__(self) -> None:
        self.tokens: weakref.WeakSet[_Token] = weakref.WeakSet()
        self.most = 0

    def pass_by(self, x: Tensor) -> Tensor:
        """Return the tensor; its graph counts as long as something holds it."""
        passed: Tensor = _Held.apply(x, self)
        return passed


class _Token:
    """Lives as long as a graph."""


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, live: Live) -> Tensor:
        ctx.token = _Token()
        live.tokens.add(ctx.token)
        live.most = max(live.most, len(live.tokens))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Watched(Block):
    """The first block of a stage."""

    live: Live

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(
            x if is_foreign(x) else self.live.pass_by(x)
        )  # while a step is looked at, it has no values


class Model(pl.LightningModule):
    """A GPT over random bytes, built in `__init__` or in `configure_model`, there with pretrained weights if there are any."""

    watch: Watch | None = None
    setup_bytes: tuple[list[int], list[int]]  # at the peak, and at rest

    def __init__(self, sizes: dict[str, int], in_init: bool = False, path: str = "", stages: int = 0) -> None:
        super().__init__()
        self.sizes, self.path, self.stages = sizes, path, stages
        self.live = Live()
        self.gpt: GPT | None = None
        if in_init:
            self.configure_model()

    def configure_model(self) -> None:
        if self.gpt is not None:
            return
        self.gpt = GPT(**self.sizes)
        if self.path:
            meshbolt.load_pretrained(self.gpt, self.path)
        for block in list(self.gpt.blocks)[:: len(self.gpt.blocks) // self.stages] if self.stages else ():
            block.__class__, block.live = Watched, self.live

    def on_fit_start(self) -> None:
        if (watch := Model.watch) is not None:
            peak = watch.grown(watch.peak)
            gc.collect()
            Model.setup_bytes = peak, watch.grown(watch.now())

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        return loss_of(self.gpt, batch[:, :-1], batch[:, 1:])

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randint(0, 256, (32, 33)), batch_size=16)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer(**setting: Any) -> pl.Trainer:
    """Return a quiet Trainer of two steps."""
    pipeline = meshbolt.PipelineParallel(int(os.environ["WORLD_SIZE"]), **setting)
    return pl.Trainer(
        accelerator="cpu",
        devices=pipeline.size,
        strategy=meshbolt.MeshStrategy(pipeline_parallel=pipeline),
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(way: str, sizes: dict[str, int], path: str = "") -> Model:
    """Train a model that is built in one way, and return it."""
    if way == "fit":
        return _by_command(sizes)
    run = trainer()
    if way == "init_module":
        with run.init_module():
            model = Model(sizes, in_init=True)
    else:
        model = Model(sizes, in_init=way == "__init__", path=path if way == "load_pretrained" else "")
    run.fit(model)
    return model


def _by_command(sizes: dict[str, int]) -> Model:
    made: list[Model] = []
    arguments = {
        "model": "pipeline_memory.Model",
        "model.sizes": json.dumps(sizes),
        "model.in_init": "true",
        "meta": "true",
        "trainer.strategy": "meshbolt.MeshStrategy",
        "trainer.strategy.pipeline_parallel": os.environ["WORLD_SIZE"],
        "trainer.accelerator": "cpu",
        "trainer.devices": os.environ["WORLD_SIZE"],
        "trainer.max_steps": "2",
        "trainer.default_root_dir": tempfile.mkdtemp(),
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    sys.argv = ["meshbolt", "fit", *(f"--{key}={value}" for key, value in arguments.items())]
    with mock.patch.object(Model, "on_fit_end", lambda model: made.append(model)):
        command_line()
    return made[0]


def own_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters that this rank holds."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not is_foreign(p))


def measure_setup(job: dict[str, Any]) -> dict[str, Any]:
    """Build a model in one way and return what it took until training."""
    # Large tensors straight from the system and back, so that what is measured is what is held, not a gap in the heap.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    # Of the same number of layers, as objects and torch's notes of them take memory too, of which a large model has not more.
    warm = {**SMALL, "layers": job["sizes"]["layers"]}
    fit(job["way"] if job["way"] != "load_pretrained" else "configure_model", warm)
    gc.collect()
    Model.watch = Watch()
    Model.watch.start()
    model = fit(job["way"], job["sizes"], job["path"])
    Model.watch.running = False
    peak, rest = Model.setup_bytes
    return {"peak": peak, "rest": rest, "own": own_bytes(model), "rank": dist.get_rank()}


def measure_live(job: dict[str, Any]) -> dict[str, Any]:
    """Train under a schedule and return how many graphs were alive at a time."""
    sizes = {**SMALL, "layers": 2 * job["stages"]}
    model = Model(sizes, in_init=True, stages=job["stages"])
    cuts = [f"gpt.blocks.{index}" for index in range(2, sizes["layers"], 2)]
    run = trainer(schedule=job["schedule"], microbatches=job["microbatches"], cuts=cuts)
    run.fit(model)
    return {"live": model.live.most, "rank": dist.get_rank()}


def main() -> None:
    """Do what the argument says and print the result."""
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    result = measure_setup(job) if "way" in job else measure_live(job)
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)  # gloo's threads may still wait for a peer that is gone


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from pipeline_memory import main as main_of_module  # so that the command line finds the same classes

    main_of_module()
