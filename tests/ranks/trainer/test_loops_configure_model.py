"""Modules built in configure_model, which no rank ever holds whole; and modules built whole, which are those of rank 0."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
import torch.distributed as dist
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, difference, trainer, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import ConfigError
from meshbolt.engine.deferred import Deferred, attach
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = ADVICE
MIB, M_MMAP_THRESHOLD = 2**20, -3
WIDTH, LAYERS = 2048, 12
MODEL_BYTES = LAYERS * (WIDTH + 1) * WIDTH * 4


def anonymous_bytes() -> int:
    """Return the memory of this process that is not mapped from files."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Watch(threading.Thread):
    """Looks at the memory of this process every few milliseconds, and keeps the largest value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest_bytes, self.ended = 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.largest_bytes = max(self.largest_bytes, anonymous_bytes())


class Large(pl.LightningModule):
    """A module of about 200 MB."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.layers: nn.ModuleList | None = None
        self.grown_bytes = 0
        if whole:
            self.configure_model()

    def configure_model(self) -> None:
        if self.layers is None:
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS))

    def on_fit_start(self) -> None:
        self.grown_bytes = self.watch.largest_bytes - self.before_bytes
        self.watch.ended.set()

    def training_step(self, batch: Any, _index: int) -> Tensor:
        raise StopAsyncIteration("the step itself is not of interest")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def growth(whole: bool, deferred: bool = False) -> int:
    # Large tensors straight from the system and back, so that what is measured is what is held, not a gap in the heap.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    warm = trainer("zero3", max_epochs=1)
    warm.fit(Regressor(), batches())
    watch, before_bytes = Watch(), anonymous_bytes()
    watch.start()
    notes = Deferred()
    with notes.building() if deferred else nullcontext():
        module = Large(whole=whole)
    if deferred:
        attach(module, notes)
    module.__dict__.update(watch=watch, before_bytes=before_bytes)
    with pytest.raises(StopAsyncIteration):
        trainer("zero3").fit(module, DataLoader(TensorDataset(torch.zeros(8, 1))))
    watch.join()
    return module.grown_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc, and knows glibc's allocator")
def test_no_rank_ever_holds_the_whole_model_that_configure_model_builds() -> None:
    assert MODEL_BYTES > 190 * MIB

    grown = run_ranks(growth, 4, False, timeout=60)
    whole = run_ranks(growth, 1, True, timeout=60)

    assert max(grown) < 0.5 * MODEL_BYTES
    assert min(grown) > 0.2 * MODEL_BYTES  # its own shard: the watch does look
    assert whole[0] > MODEL_BYTES


class Loading(Regressor):
    """Builds its layers in configure_model, and loads weights into them by one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.body: nn.Module | None = None

    def configure_model(self) -> None:
        if self.body is not None:
            return
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        real = torch.from_numpy(numpy.full((4, 4), 0.5, dtype="float32"))
        if self.way == "load_state_dict":
            self.body[0].load_state_dict({"weight": real, "bias": real[0]})
        elif self.way == "copy":
            with torch.no_grad():
                self.body[0].weight.copy_(real)
        elif self.way == "data":
            self.body[0].weight.data[:2] = real[:2]
        elif self.way == "assign":
            self.body[0].load_state_dict({"weight": real, "bias": real[0]}, assign=True)


def load_weights(way: str) -> Tensor:
    module = Loading(way)
    trainer("zero3", max_epochs=1).fit(module, batches(), batches())
    return weights(module)["body.0.weight"]


@pytest.mark.parametrize("way", ["load_state_dict", "copy", "data"])
def test_weights_loaded_into_a_module_without_values_are_refused_with_a_remedy(way: str) -> None:
    for said in run_ranks_expecting(load_weights, 2, way, error=ConfigError, match="load_pretrained"):
        assert "weight" in said or "shape (4, 4)" in said or "shape (2, 4)" in said


def test_weights_that_are_assigned_in_configure_model_are_kept() -> None:
    for weight in run_ranks(load_weights, 2, "assign"):
        assert torch.equal(weight, torch.full((4, 4), 0.5))


def built_from(seed_of_rank: bool, on_meta: bool) -> dict[str, Tensor]:
    class Late(Regressor):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)
            self.losses = []

        def configure_model(self) -> None:
            if not hasattr(self, "head"):
                self.inp, self.head = nn.Linear(7, 10), nn.Linear(10, 1)
                self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(10, 13), nn.Linear(13, 10)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(10 + (dist.get_rank() if seed_of_rank else 0))
    module = Late()
    if not on_meta:
        module.configure_model()
    trainer("zero3", max_epochs=1, limit_train_batches=1).fit(module, batches(), batches())
    return weights(module)


def test_a_module_has_the_weights_of_rank_zero_wherever_it_is_built() -> None:
    (alone,) = run_ranks(built_from, 1, False, False)
    for on_meta in (False, True):
        for rank in run_ranks(built_from, 3, True, on_meta):
            assert difference(rank, alone) == 0
