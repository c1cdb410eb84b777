"""What the tests of loops and callbacks share: a small module with a bit of everything, its data, and quiet Trainers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from meshbolt.strategies import MeshStrategy

SAMPLES, BATCH = 24, 3

# Lightning's advice about things that tests do on purpose; every other warning is an error.
ADVICE = [
    pytest.mark.filterwarnings(f"ignore:{beginning}")
    for beginning in (
        "Using `DistributedSampler` with the dataloaders",
        "You defined a `validation_step` but have no `val_dataloader`",
        ".* is called with Trainer configured with multiple `ModelCheckpoint`",
        "Checkpoint directory .* exists and is not empty",
        "Be aware that when using `ckpt_path`",
        ".*The last model of the previous `fit` call will be used",
        ".*there is no last checkpoint available",
        "You're resuming from a checkpoint that ended before the epoch ended",
    )
]


class Regressor(pl.LightningModule):
    """Repeated blocks, a 0-dim and a root-owned parameter, and logs of every kind."""

    def __init__(self, *, dropout: float = 0.0, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.inp = nn.Linear(7, 10)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.extra = nn.Parameter(torch.ones(3))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 13), nn.GELU(), nn.Dropout(dropout), nn.Linear(13, 10)) for _ in range(3)
        )
        self.head = nn.Linear(10, 1)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) * self.scale + self.extra.sum()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, _index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

    def predict_step(self, batch: Any, _index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)}


def dataset(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 7, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def batches(samples: int = SAMPLES, *, batch_size: int = BATCH, **options: Any) -> DataLoader[Any]:
    """Return a loader for one process; on several ranks Lightning divides it (and shuffles it for training)."""
    return DataLoader(dataset(samples), batch_size=batch_size, **options)


def in_order(samples: int = SAMPLES, *, batch_size: int = BATCH) -> DataLoader[Any]:
    """Return a loader that is not shuffled for training: batches of n ranks are those of one process, n times as large."""
    if not dist.is_initialized():
        return batches(samples, batch_size=batch_size)
    data = dataset(samples)
    return DataLoader(data, batch_size=batch_size, sampler=DistributedSampler(data, shuffle=False))


def trainer(strategy: Any = "zero2", **options: Any) -> pl.Trainer:
    """Return a Trainer on all ranks that does what it is told and prints nothing."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in options.get("callbacks", ())),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "devices": dist.get_world_size() if dist.is_initialized() else 1,
    }
    return pl.Trainer(accelerator="cpu", strategy=strategy, **{**quiet, **options})


def alone(strategy: str = "auto", **options: Any) -> pl.Trainer:
    """Return a Trainer without meshbolt; to be used on one rank, where it ends what makes it one of several."""
    if dist.is_initialized():
        dist.destroy_process_group()
    return trainer(strategy, **options)


def strategy_of(owner: pl.Trainer) -> MeshStrategy:
    assert isinstance(owner.strategy, MeshStrategy)
    return owner.strategy


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return whole parameters by name, on every rank."""
    return {name: whole(parameter) for name, parameter in module.named_parameters()}


def metrics(owner: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in owner.callback_metrics.items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest absolute difference between tensors of the same names."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
