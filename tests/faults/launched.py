"""A training script that `meshbolt launch` starts in tests: 8 samples a step, on however many ranks; writes losses down."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import meshbolt  # registers the strategies

BATCH, STEPS = 8, 8
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
SLOW_SECONDS = next((float(word.partition("=")[2] or "60") for word in sys.argv if word.startswith("--slow")), 0.0)


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layers(x), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Watch(Callback):
    """Writes losses, and does what a test asks for at a step of the first start."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.is_global_zero:
            with Path("losses.txt").open("a") as file:
                file.write(f"{WORLD} {trainer.global_step} {float(trainer.callback_metrics['loss']):.9f}\n")
        first = not int(os.environ.get("MESHBOLT_RESTARTS") or 0) and os.environ.get("TORCHELASTIC_RESTART_COUNT") in (
            None,
            "0",
        )
        if first and "--fail" in sys.argv and trainer.global_step == 4 and trainer.global_rank == WORLD - 1:
            raise ValueError(f"on purpose on rank {trainer.global_rank}")
        if first and SLOW_SECONDS and trainer.global_step >= 3:
            time.sleep(0.5 if trainer.global_step < 5 else SLOW_SECONDS)


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * STEPS, 8, generator=generator)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    trainer = pl.Trainer(
        strategy=meshbolt.MeshStrategy(zero=2) if "RANK" in os.environ else "auto",
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch(), ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    mine = DistributedSampler(data, WORLD, int(os.environ.get("RANK", "0")), shuffle=False)
    trainer.fit(Model(), DataLoader(data, batch_size=BATCH // WORLD, sampler=mine))


if __name__ == "__main__":
    main()
