"""A training loop of one's own, with Lightning Fabric: import the strategy from `meshbolt.fabric`.

    python examples/fabric_loop.py

It accumulates over two batches, clips by norm, saves a checkpoint directory, and goes on from it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from meshbolt.fabric import MeshStrategy

WINDOW = 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.out = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def main() -> None:
    fabric = Fabric(strategy=MeshStrategy(zero=3), accelerator="cpu", devices=2)
    fabric.launch()
    fabric.seed_everything(1, verbose=False)

    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = fabric.setup(model, optimizer)
    inputs = torch.randn(512, 32)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=16))

    for epoch in range(3):
        for index, (x, y) in enumerate(loader):
            is_last = (index + 1) % WINDOW == 0
            with fabric.no_backward_sync(model, enabled=not is_last):
                loss = F.mse_loss(model(x), y)
                fabric.backward(loss / WINDOW)
            if is_last:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
        fabric.print(f"epoch {epoch}: loss {fabric.all_reduce(loss.detach()):.4f}")

    with tempfile.TemporaryDirectory() as own:
        path = Path(fabric.broadcast(own)) / "regression.ckpt"
        fabric.save(path, {"model": model, "optimizer": optimizer, "epoch": 3})
        rest = fabric.load(path, {"model": model, "optimizer": optimizer})
        fabric.print(f"saved and read again: epoch {rest['epoch']}")
        fabric.barrier()


if __name__ == "__main__":
    main()
