"""A small GPT in two pipeline stages: the same script and model, first in one process, then with a stage on each of two ranks.

    python examples/pipeline.py

Both runs print the same losses. Nothing in the model knows of stages: `training_step` runs on both ranks, the second one enters
it at the layer with which its stage begins, and each holds the parameters of its own stage only.
"""

from __future__ import annotations

import os

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.demos import ByteGPT, PydocText

IS_FIRST_RANK = os.environ.get("LOCAL_RANK", "0") == "0"


class Losses(pl.Callback):
    """Keeps the loss of every step, which all ranks know."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def train(name: str, **options) -> list[float]:
    pl.seed_everything(1, verbose=False)
    losses, text = Losses(), PydocText()
    text.setup("fit")
    trainer = pl.Trainer(
        **options,
        accelerator="cpu",
        max_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
    )
    # Not shuffled, so that both runs see the same batches.
    trainer.fit(ByteGPT(dim=64, num_layers=4), DataLoader(text.train_dataloader().dataset, batch_size=8))
    if trainer.is_global_zero:
        print(f"{name:11}", *(f"{loss:.4f}" for loss in losses.values), flush=True)
    return losses.values


if __name__ == "__main__":
    alone = train("one process", devices=1) if IS_FIRST_RANK else []
    # strategy="pipeline_parallel" is the same, with the number of microbatches and the cut left to defaults.
    two_stages = MeshStrategy(zero=1, pipeline_parallel=PipelineParallel(2, microbatches=4, cuts=["blocks.2"]))
    pipelined = train("two stages", strategy=two_stages, devices=2)
    difference = max((abs(a - b) for a, b in zip(alone, pipelined, strict=False)), default=0.0)
    if difference > 1e-4:
        raise SystemExit(f"the losses differ by {difference}")
