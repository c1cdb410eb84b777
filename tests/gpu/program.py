"""Train a small module on N devices under a strategy, and compare it with a plain loop over the same batches.

python program.py STRATEGY PRECISION ACCELERATOR DEVICES: exit code 0 and one "equal" or "near" per rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from meshbolt import MeshStrategy, Offload
from meshbolt.compat import whole_of
from meshbolt.plugins import MixedPrecision

STEPS, BATCH, WIDTH = 5, 8, 13
OFFLOADED: dict[str, Callable[[], MeshStrategy]] = {
    "hosted": lambda: MeshStrategy(zero=3, offload=Offload("cpu", parameters="cpu")),
    "hosted_unlocked": lambda: MeshStrategy(zero=3, offload=Offload("cpu", parameters="cpu", pin_memory=False)),
    "hosted_nvme": lambda: MeshStrategy(zero=3, offload=Offload("nvme", parameters="cpu", path="$MESHBOLT_NVME_PATH")),
    "auto": lambda: MeshStrategy(zero=2, offload=Offload("cpu", fraction="auto")),
    "auto_nvme": lambda: MeshStrategy(zero=3, offload=Offload("nvme", fraction="auto", path="$MESHBOLT_NVME_PATH")),
}


class Regression(L.LightningModule):
    """Two blocks, a head, and a parameter of the module's own: units, a root, and sizes that ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.scale = nn.Parameter(torch.ones(3))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        hidden, target = batch
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.mse_loss(self.head(hidden) * self.scale.mean(), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        world = self.trainer.world_size
        # Batch i of all ranks together is batch i of the plain loop, which shuffling would undo.
        sampler = DistributedSampler(dataset(), num_replicas=world, rank=self.global_rank, shuffle=False)
        return DataLoader(dataset(), batch_size=BATCH // world, sampler=sampler)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    rows = STEPS * BATCH
    return TensorDataset(torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, 1, generator=generator))


def train_sharded(strategy: str, precision: str, accelerator: str, devices: int) -> Regression:
    L.seed_everything(7)
    module = Regression()
    flags: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        # The first loss scale of the flag overflows here; a step that is skipped would not be the plain loop's.
        flags = {"plugins": [MixedPrecision("16-mixed", "cuda" if accelerator == "gpu" else "cpu", init_scale=2.0**8)]}
    trainer = L.Trainer(
        **flags,
        strategy=OFFLOADED[strategy]() if strategy in OFFLOADED else strategy,
        accelerator=accelerator,
        devices=devices,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module


def train_plain() -> Regression:
    L.seed_everything(7)
    module = Regression()
    optimizer = module.configure_optimizers()
    inputs, targets = dataset().tensors
    for batch in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
        optimizer.zero_grad()
        module.training_step(list(batch)).backward()
        optimizer.step()
    return module


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's parameters on the CPU, gathered; every rank calls it."""
    # torch 2.11's `full_tensor` does not know how a fused projection is divided.
    return {
        name: (whole_of(value) if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in module.state_dict().items()
    }


def main(strategy: str, precision: str, accelerator: str, devices: str) -> None:
    sharded, plain = train_sharded(strategy, precision, accelerator, int(devices)), train_plain()
    if precision == "32-true":
        # TF32 is off by default; what is left is the order of sums on another device.
        torch.testing.assert_close(whole(sharded), whole(plain), rtol=1e-4, atol=1e-5)
        print("equal", flush=True)
    else:
        weights = whole(sharded)
        assert all(value.dtype == torch.float32 for value in weights.values()), "shards are not float32"
        torch.testing.assert_close(weights, whole(plain), rtol=0.0, atol=0.01)
        print("near", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
