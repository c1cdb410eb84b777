"""A Hugging Face model in two pipeline stages, times two ranks of data parallelism; its configuration is here, nothing is loaded.

    python examples/pipeline_huggingface.py

The model is Hugging Face's own class, inside an ordinary LightningModule. Its embedding is its head as well: it lies on both
stages, and its gradients are added up. Four ranks are two pipelines, which see different batches and share the optimizer state
of each stage between them (ZeRO-1).
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.callbacks import LogProgress
from meshbolt.demos import PydocText


class Llama(pl.LightningModule):
    """A small Llama over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=True,
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
        # `cuts` chooses by itself what takes the same time; blocks= and split=[2, 2] or cuts=["model.model.layers.2"] say it.
        strategy=MeshStrategy(zero=1, pipeline_parallel=PipelineParallel(2, microbatches=4)),
        accelerator="cpu",
        devices=4,
        max_steps=20,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[LogProgress(interval_seconds=2)],
    )
    trainer.fit(Llama(), PydocText(batch_size=8))


if __name__ == "__main__":
    main()
