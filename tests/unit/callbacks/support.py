"""A small module in a Trainer of one process, for callbacks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Module(pl.LightningModule):
    """Embeds tokens and learns to say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10, 4), nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.out(self.embedding(batch[0])).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.out(self.embedding(batch[0])).square().mean(), prog_bar=True)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.out(self.embedding(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tokens(batches: int) -> DataLoader[Any]:
    """Batches of 2 × 5 tokens."""
    return DataLoader(TensorDataset(torch.arange(10 * batches).reshape(-1, 5) % 10), batch_size=2)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=1, **quiet | {"max_epochs": 1} | options)
