"""A model of one's own under tensor parallelism: two ranks share every layer that a mapping names, and nothing else changes.

    python examples/tensor_parallel_mapping.py

The model is written as for one device. A mapping says which layers are divided: `colwise` where an activation becomes wide or
is cut into heads, `rowwise` where it becomes narrow again. Each rank then computes with its half of those weights, and both
train as one process would; `meshbolt.testing.assert_parity` proves that for a model and a mapping of yours.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshbolt import MeshStrategy, TensorParallel
from meshbolt.callbacks import LogProgress
from meshbolt.demos import PydocText

PLAN = {
    "blocks.*.query": "colwise",  # by heads: each rank attends with two of the four
    "blocks.*.key_value": "colwise/2",  # two projections in one layer, each divided by heads
    "blocks.*.out": "rowwise",
    "blocks.*.widen": "colwise",
    "blocks.*.narrow": "rowwise",
    "embed": "rowwise",  # by rows of the table
    "head": "colwise_gather",  # by bytes; the logits are gathered for the loss
}


class Block(nn.Module):
    """Attention and a perceptron in one module, with names of its own."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm1(x)
        projections = (self.query(read), *self.key_value(read).chunk(2, dim=-1))
        query, key, value = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in projections)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class Model(pl.LightningModule):
    """A language model over bytes."""

    def __init__(self, dim: int = 64, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.places = nn.Parameter(torch.randn(128, dim) / 10)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, following = batch
        x = self.embed(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), following.flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Shares(pl.Callback):
    """Says how much of a divided layer a rank holds."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weight = pl_module.blocks[0].widen.weight
        pl_module.print(
            f"blocks.0.widen.weight is {tuple(weight.shape)}, and a rank holds {tuple(weight.to_local().shape)}"
        )


def main() -> None:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        strategy=MeshStrategy(zero=0, tensor_parallel=TensorParallel(2, plan=PLAN)),
        accelerator="cpu",
        devices=2,
        max_steps=20,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[LogProgress(interval_seconds=2), Shares()],
    )
    trainer.fit(Model(), PydocText())


if __name__ == "__main__":
    main()
