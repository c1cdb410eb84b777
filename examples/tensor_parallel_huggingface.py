"""A Hugging Face model under tensor parallelism and ZeRO-1, built from a configuration, without a download.

    python examples/tensor_parallel_huggingface.py

The model is Hugging Face's own class, inside an ordinary LightningModule. Its layers are known by name: attention is divided
by heads, perceptrons by width, embedding and head by rows of the vocabulary. `loss_parallel` leaves the logits divided: each
rank computes its part of the loss, and no rank ever holds all logits. What is divided is printed at the start.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from meshbolt import MeshStrategy, TensorParallel
from meshbolt.callbacks import LogProgress
from meshbolt.demos import PydocText


class Llama(pl.LightningModule):
    """A small Llama over bytes, with two key/value heads for each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=128,
                use_cache=False,
            )
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, _ = batch
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        # With four ranks, two groups of two would see different batches and share the optimizer state.
        strategy=MeshStrategy(zero=1, tensor_parallel=TensorParallel(2, loss_parallel=True)),
        accelerator="cpu",
        devices=2,
        max_steps=20,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[LogProgress(interval_seconds=2)],
    )
    trainer.fit(Llama(), PydocText(batch_size=4))


if __name__ == "__main__":
    main()
