"""The loop of `plain_torch.py` over Lightning Fabric, as one writes it with Accelerate: sharded over two ranks.

python examples/three_loops/over_fabric.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from meshbolt.fabric import MeshStrategy

EPOCHS, WINDOW = 2, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


def data() -> TensorDataset:
    inputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def main() -> None:
    # Accelerator(...), prepare(...), backward, accumulate, clip_grad_norm_ and print have a counterpart each.
    fabric = Fabric(strategy=MeshStrategy(zero=2), accelerator="cpu", devices=2)
    fabric.launch()
    torch.manual_seed(1)
    model = nn.Sequential(*[Block() for _ in range(4)], nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model, optimizer = fabric.setup(model, optimizer)
    # Half of a batch on each rank.
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=16, shuffle=True))

    for epoch in range(EPOCHS):
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


if __name__ == "__main__":
    main()
