"""Modules built in configure_model, which no rank ever holds whole; and modules built whole, which are those of rank 0."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import ConfigError
from meshbolt.testing import run_ranks, run_ranks_expecting
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, trainer, weights

pytestmark = ADVICE
MIB = 2**20
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
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def on_fit_start(self) -> None:
        self.grown_bytes = self.watch.largest_bytes - self.before_bytes
        self.watch.ended.set()

    def training_step(self, batch: Any, _index: int) -> Tensor:
        raise StopAsyncIteration("the step itself is not of interest")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def growth(whole: bool) -> int:
    warm = trainer("zero3", max_epochs=1)
    warm.fit(Regressor(), batches())
    watch, before_bytes = Watch(), anonymous_bytes()
    watch.start()
    module = Large(whole=whole)
    module.__dict__.update(watch=watch, before_bytes=before_bytes)
    with pytest.raises(StopAsyncIteration):
        trainer("zero3").fit(module, DataLoader(TensorDataset(torch.zeros(8, 1))))
    watch.join()
    return module.grown_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_no_rank_ever_holds_the_whole_model_that_configure_model_builds() -> None:
    assert MODEL_BYTES > 190 * MIB

    grown = run_ranks(growth, 4, False, timeout=60)
    whole = run_ranks(growth, 1, True, timeout=60)

    assert max(grown) < 0.5 * MODEL_BYTES
    assert min(grown) > 0.2 * MODEL_BYTES  # its own shard: the watch does look
    assert whole[0] > MODEL_BYTES
