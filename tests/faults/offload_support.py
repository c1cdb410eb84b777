"""What the tests of offloaded state that fails share: a run in whose fourth step something happens to its files."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from tests.unit.offload.faulty import PAGE, Fault, FaultyFace, error_of, no_fault
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import MeshStrategy, Offload, Zero
from meshbolt.offload.files import StateFile
from meshbolt.strategies.compat import default_store
from meshbolt.testing import run_ranks

WIDTH, SAMPLES, STEPS, SAVED, FAULTY = 64, 24, 6, 2, 3
TIMEOUT_SECONDS, SOON_SECONDS, STUCK_SECONDS = 90, 30, 1.5


class Net(pl.LightningModule):
    """Layers, in whose fourth step something happens."""

    def __init__(self, happens: Callable[[], None] = lambda: None, *, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 1)
        self.happens = happens
        self.losses: list[float] = []

    def training_step(self, batch: Any, _index: int) -> Tensor:
        if self.global_step == FAULTY:
            self.happens()
        (x,) = batch
        for layer in self.layers:
            x = torch.tanh(layer(x))
        loss: Tensor = self.head(x).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


def failing(what: str, code: int) -> Fault:
    def fault(direction: str, _offset: int, num_bytes: int) -> int:
        if direction == what:
            raise error_of(code)
        return num_bytes

    return fault


def stuck(_what: str, _offset: int, num_bytes: int) -> int:
    threading.Event().wait()
    return num_bytes


def slow(_what: str, _offset: int, num_bytes: int) -> int:
    time.sleep(0.01)
    return num_bytes


def files_of(folder: str) -> list[Path]:
    """Return the descriptors of this process whose files were made in a folder, and have lost their names."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(fd.readlink()).startswith(f"{folder}/"):
                found.append(fd)
    return found


def truncate(folder: str) -> None:
    for file in files_of(folder):
        os.truncate(file, PAGE)


def limit_files(_folder: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))


def kill(_folder: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Fault] = {
    "a read error": failing("read", errno.EIO),
    "a write error": failing("write", errno.EIO),
    "a full disk": failing("write", errno.ENOSPC),
    "no answer": stuck,
    "a slow disk": slow,
    "short reads": lambda what, _offset, size: PAGE if what == "read" else size,
    "short writes": lambda what, _offset, size: PAGE if what == "write" else size,
}
DEEDS: dict[str, Callable[[str], None]] = {
    "a file cut short": truncate,
    "a limit of the process": limit_files,
    "its directory removed": shutil.rmtree,
    "it is killed": kill,
}


class Scene:
    """One rank's run: where its files are, what happens to them, and who looks on."""

    def __init__(self, folder: Path, fault: str, ranks: tuple[int, ...], settings: dict[str, Any]) -> None:
        self.disk, self.checkpoints, self.exception = (
            str(folder / name) for name in ("disk", "checkpoints", "exception")
        )
        self.fault, self.ranks = fault, ranks
        self.settings = {"zero": 2, "overlap": "auto", "width": WIDTH, "parameters": False, **settings}
        self.face = FaultyFace()
        self.trainer: pl.Trainer | None = None

    def happens(self) -> None:
        if dist.get_rank() in self.ranks:
            self.face.fault = FAULTS.get(self.fault, no_fault)
            DEEDS.get(self.fault, lambda _: None)(self.disk)

    def new_trainer(self) -> pl.Trainer:
        parameters = "nvme" if self.settings["parameters"] else None
        offload = Offload("nvme", parameters, path=self.disk, overlap=self.settings["overlap"])
        return pl.Trainer(
            strategy=MeshStrategy(zero=Zero(self.settings["zero"], unit=("Linear",)), offload=offload),
            accelerator="cpu",
            devices=dist.get_world_size(),
            max_steps=STEPS,
            callbacks=[
                ModelCheckpoint(self.checkpoints, "{step}", every_n_train_steps=SAVED, save_top_k=-1),
                OnExceptionCheckpoint(self.exception),
            ],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )

    def run(self, module: Net | None = None, *, load: str | None = None) -> Net:
        module = module or Net(self.happens, width=self.settings["width"])
        self.trainer = self.trainer or self.new_trainer()
        torch.manual_seed(dist.get_rank())
        data = TensorDataset(torch.randn(SAMPLES, self.settings["width"]))
        with pytest.MonkeyPatch.context() as patched:
            if self.settings["overlap"] is True:
                patched.setenv("MESHBOLT_FAST_PATH", "0")
            patience = STUCK_SECONDS if self.fault == "no answer" else 30.0
            # What happens for real happens to whatever moves blocks here.
            face = self.face if self.fault in FAULTS else None
            made = functools.partial(StateFile, face=face, timeout_seconds=patience)
            # With parameters in a file only that one's disk fails.
            where = "hosted" if self.settings["parameters"] else "offloaded"
            patched.setattr(f"meshbolt.engine.{where}.StateFile", made)
            self.trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=load)
        return module


def train(
    folder: Path, fault: str, ranks: tuple[int, ...], settings: dict[str, Any]
) -> tuple[str, str, list[float], float]:
    """Return what a run has ended with, its losses, and how long it took."""
    scene, began = Scene(folder, fault, ranks, settings), time.monotonic()
    try:
        module = scene.run()
    except Exception as error:  # every kind is looked at by the test
        seconds = time.monotonic() - began
        stay_for_the_others()
        return type(error).__name__, str(error), [], seconds
    return "nothing", "", module.losses, time.monotonic() - began


known: dict[int, list[list[float]]] = {}


def undisturbed(folder: Path, *, width: int = WIDTH, zero: int = 2, overlap: Any = "auto") -> list[list[float]]:
    """Return the losses of both ranks of a run in which nothing happens; those of all stages are the same."""
    if width not in known:
        (folder / "whole").mkdir()
        results = run_ranks(train, 2, folder / "whole", "", (), {"width": width, "zero": zero}, timeout=TIMEOUT_SECONDS)
        known[width] = [losses for _, _, losses, _ in results]
        assert all(len(losses) == STEPS for losses in known[width])
    return known[width]


def resume(folder: Path, path: str, settings: dict[str, Any]) -> list[float]:
    return Scene(folder, "", (), settings).run(load=path).losses


def stay_for_the_others() -> None:
    """Keep this process, and so its connections, until all ranks have ended, or would have."""
    store = default_store()
    store.set(f"ended/{dist.get_rank()}", "")
    with contextlib.suppress(RuntimeError):
        store.wait([f"ended/{rank}" for rank in range(dist.get_world_size())], timedelta(seconds=SOON_SECONDS))
