"""Train a small GPT as one of several ranks that share one device over gloo, and compare it with one process.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 ... python shared_gpu.py SETTING PRECISION ACCELERATOR: exit code 0 and "equal" or "near".
NCCL refuses two ranks on one GPU; gloo carries tensors through the host, which is slow, and all else is as on several GPUs.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from program import whole
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meshbolt import MeshStrategy, PipelineParallel, TensorParallel
from meshbolt.demos.model import Block

STEPS, SAMPLES, LENGTH, WIDTH = 4, 4, 16, 32
SETTINGS: dict[str, dict[str, Any]] = {
    "tp2": {"zero": 0, "tensor_parallel": 2},
    "tp2_whole_sequences": {
        "zero": 0,
        "tensor_parallel": TensorParallel(2, sequence_parallel=True, loss_parallel=True),
    },
    "tp2_zero2": {"zero": 2, "tensor_parallel": 2},
    "tp2_zero3": {"zero": 3, "tensor_parallel": 2},
    "zero1": {"zero": 1},
    "pp2": {"zero": 1, "pipeline_parallel": 2},
    "pp2_interleaved": {"zero": 0, "pipeline_parallel": PipelineParallel(2, schedule="interleaved_1f1b")},
    "pp2_zero3": {"zero": 3, "pipeline_parallel": 2},
    "pp2_tp2": {"zero": 0, "pipeline_parallel": 2, "tensor_parallel": 2},
    "zero3": {"zero": 3},
}


class Language(L.LightningModule):
    """A GPT with dropout, whose mask of all ranks of a tensor-parallel group together is that of one process."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, num_heads=4) for _ in range(2))
        self.head = nn.Linear(WIDTH, 256)

    def training_step(self, batch: Tensor) -> Tensor:
        torch.manual_seed(self.global_step)  # whatever was drawn since the ranks met
        x = self.embed(batch[:, :-1])
        for block in self.blocks:
            x = F.dropout(block(x), self.dropout)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(3)
        tokens = [torch.randint(256, (SAMPLES, LENGTH + 1), generator=generator) for _ in range(STEPS)]
        ranks = getattr(self.trainer.strategy, "data_parallel_size", 1)
        own = self.trainer.strategy.data_parallel_rank if ranks > 1 else 0
        return DataLoader([batch.chunk(ranks)[own] for batch in tokens], batch_size=None)  # type: ignore[arg-type]


def train(strategy: Any, precision: str, accelerator: str, *, nodes: int, dropout: float) -> Language:
    L.seed_everything(7)
    module = Language(dropout)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"precision": precision, "max_epochs": 1, "enable_checkpointing": False, "use_distributed_sampler": False}
    # One device of one machine for each rank: Lightning would not have them share one otherwise.
    L.Trainer(strategy=strategy, accelerator=accelerator, devices=1, num_nodes=nodes, **quiet, **options).fit(module)
    return module


def gathered(module: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return all parameters, whole; what rank 0 makes of them in the meantime arrives wherever they are held."""
    strategy: Any = module.trainer.strategy
    with strategy.gathered(module), torch.no_grad():
        found = {name: parameter.detach().cpu().clone() for name, parameter in module.named_parameters()}
        for parameter in module.parameters() if rank == 0 else ():
            parameter.neg_()
    with strategy.gathered(module):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.detach().cpu(), -found[name], rtol=0.0, atol=0.0)
    return found


def main(setting: str, precision: str, accelerator: str) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    # Ranks that see samples of their own draw masks of their own.
    dropout = 0.2 if ranks == 2 and setting.startswith("tp2") else 0.0
    strategy = MeshStrategy(**SETTINGS[setting], process_group_backend="gloo")
    module = train(strategy, precision, accelerator, nodes=ranks, dropout=dropout)
    sharded = gathered(module, int(os.environ["RANK"]))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    plain = whole(train("auto", precision, accelerator, nodes=1, dropout=dropout))
    if precision == "32-true":
        # What is left is the order of sums.
        torch.testing.assert_close(sharded, plain, rtol=1e-4, atol=1e-5)
        print("equal", flush=True)
    else:
        torch.testing.assert_close(sharded, plain, rtol=0.0, atol=0.02)
        print("near", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
