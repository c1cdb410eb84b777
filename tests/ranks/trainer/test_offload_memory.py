"""If these fail, optimizer state that lies in a file is in memory as well, and a run that needs the file does not fit."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.ranks.trainer.test_offload import WARNING
from tests.rows import full
from torch import Tensor, nn

from meshbolt import Checkpoint, MeshStrategy, Offload
from meshbolt.testing import run_ranks

pytestmark = [
    pytest.mark.filterwarnings(WARNING),
    pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell what memory is a process's own"),
]

WIDTH, LAYERS, MIB = 3600, 3, 2**20
LAYER_MIB = WIDTH * WIDTH * 4 / MIB
PIECES_MIB = 4 * 64  # what may be in memory of the state, which has six times LAYER_MIB on one rank
WHILE_SAVED_MIB = 24  # less than one of a layer's moments, which are written without being in memory as a whole


def own_mib() -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) / 1024


class Sampler(threading.Thread):
    """Keeps the most memory that this process has in each phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase, self.peaks = "other", {}  # type: ignore[var-annotated]

    def run(self) -> None:
        while self.phase:
            phase, value = self.phase, own_mib()
            self.peaks[phase] = max(self.peaks.get(phase, 0.0), value)
            time.sleep(0.002)


class Wide(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()

    def configure_model(self) -> None:
        if not self.layers:
            self.layers.extend(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        for layer in self.layers:
            batch = layer(batch)
        return batch.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Watched(pl.Callback):
    """Notes what is there at rest, and the most while a checkpoint is saved or loaded."""

    def __init__(self, sampler: Sampler, save: str | None) -> None:
        self.sampler, self.save, self.seen = sampler, save, {}  # type: ignore[var-annotated]

    def on_train_start(self, *_: Any) -> None:
        self.sampler.phase = "other"
        self.seen["before"] = own_mib()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.optimizers[0].zero_grad()
        self.seen["rest"] = own_mib()
        if self.save is not None and trainer.is_last_batch:
            self.sampler.phase = "save"
            trainer.save_checkpoint(self.save)
            self.sampler.phase = "other"


def watched(path: str, ranks: int, save: str | None, load: str | None, asynchronous: bool) -> dict[str, float]:
    """Train, and return what was there when, in MiB."""
    strategy = MeshStrategy(
        zero=3, offload=Offload("nvme", path=path), checkpoint=Checkpoint(asynchronous=asynchronous)
    )
    sampler = Sampler()
    callback = Watched(sampler, save)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks,
        max_epochs=1 if load is None else 2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    read = strategy.load_checkpoint

    def load_from_here(*args: Any, **kwargs: Any) -> Any:
        callback.seen["before the load"] = own_mib()
        sampler.phase = "load"
        return read(*args, **kwargs)

    strategy.load_checkpoint = load_from_here  # type: ignore[method-assign]
    sampler.start()
    trainer.fit(Wide(), torch.utils.data.DataLoader(torch.randn(2 * ranks, WIDTH), batch_size=1), ckpt_path=load)
    sampler.phase = ""
    sampler.join()
    return {**sampler.peaks, **callback.seen}


@pytest.mark.parametrize(("ranks", "asynchronous"), [(1, False), full(2, False), full(1, True)])
def test_state_in_a_file_is_in_memory_in_pieces_only(ranks: int, asynchronous: bool, tmp_path: Path) -> None:
    path, saved = str(tmp_path), str(tmp_path / "saved")
    weights = LAYERS * LAYER_MIB / ranks  # the state is twice that
    for seen in run_ranks(watched, ranks, path, ranks, saved, None, asynchronous, timeout=120):
        assert seen["rest"] - seen["before"] < PIECES_MIB
        # The weights are copied for a thread that writes them later.
        assert seen["save"] - seen["rest"] < WHILE_SAVED_MIB + weights * asynchronous
    for seen in run_ranks(watched, ranks, path, ranks, None, saved, asynchronous, timeout=120):
        assert seen["load"] - seen["before the load"] < weights + PIECES_MIB
        assert seen["rest"] - seen["before the load"] < PIECES_MIB
