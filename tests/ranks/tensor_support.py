"""What the tests of tensor parallelism under the strategies share: a small module with a plan, and quiet Trainers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import MeshStrategy, TensorParallel

PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
WIDTH = 8


class Block(nn.Module):
    """Two layers of which each rank has a part."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(x))))


class Net(pl.LightningModule):
    """Divided blocks between layers that are whole."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: Any, _index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def strategy(zero: Any = 1, size: Any = 2, **options: Any) -> MeshStrategy:
    """Return a strategy that divides the blocks of `Net`."""
    return MeshStrategy(zero=zero, tensor_parallel=TensorParallel(size, plan=PLAN, **options) if size != 1 else 1)


def samples(count: int = 8) -> TensorDataset:
    """Return as many samples, and their numbers from 1 on."""
    return TensorDataset(
        torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(1, count + 1)
    )


def loader(count: int = 8, *, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    """Return a loader for one process, which Lightning divides."""
    return DataLoader(samples(count), batch_size=batch_size, **options)


def trainer(of: Any = None, **options: Any) -> pl.Trainer:
    """Return a Trainer on all ranks that prints nothing."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "devices": dist.get_world_size() if dist.is_initialized() else 1,
    }
    return pl.Trainer(accelerator="cpu", strategy=of or strategy(), **{**quiet, **options})
