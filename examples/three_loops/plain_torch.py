"""One training loop, three times: here in plain PyTorch, beside it over Fabric and as DeepSpeed's.

    python examples/three_loops/plain_torch.py

The other two differ from this file where their comments say so; `diff` shows it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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
    torch.manual_seed(1)
    model = nn.Sequential(*[Block() for _ in range(4)], nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    loader = DataLoader(data(), batch_size=32, shuffle=True)

    for epoch in range(EPOCHS):
        for index, (x, y) in enumerate(loader):
            loss = F.mse_loss(model(x), y)
            (loss / WINDOW).backward()
            if (index + 1) % WINDOW == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        print(f"epoch {epoch}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
