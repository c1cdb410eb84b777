"""The loop of `plain_torch.py` as it is written for DeepSpeed: only the import says meshbolt.

python examples/three_loops/as_deepspeed.py                                   # alone
meshbolt launch --nproc-per-node 2 examples/three_loops/as_deepspeed.py       # or torchrun: sharded over two ranks
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from meshbolt import deepspeed

EPOCHS, WINDOW = 2, 2
# What a script reads from its ds_config.json.
CONFIG = {
    "train_batch_size": 32 * WINDOW,
    "gradient_accumulation_steps": WINDOW,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
    "zero_optimization": {"stage": 2},
}


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
    engine, _, loader, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), training_data=data(), config=CONFIG
    )

    for epoch in range(EPOCHS):
        loader.data_sampler.set_epoch(epoch)
        for x, y in loader:
            loss = F.mse_loss(engine(x.to(engine.device)), y.to(engine.device))
            # Both are called for every batch: the engine counts them, and updates after the last of a window.
            engine.backward(loss)
            engine.step()
        loss = loss.detach() / engine.world_size
        deepspeed.comm.all_reduce(loss)
        if engine.global_rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
