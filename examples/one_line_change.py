"""The one line that changes: the same script, model and data, first in plain data parallelism, then under ZeRO-2.

    python examples/one_line_change.py

Both runs print the same losses. What differs is what each rank keeps: under ZeRO-2 half of the gradients and of the
optimizer state.
"""

from __future__ import annotations

import lightning.pytorch as pl

import meshbolt  # noqa: F401  (registers the names zero0 ... zero3)
from meshbolt.demos import ByteGPT, PydocText


class Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def train(strategy: str) -> list[float]:
    pl.seed_everything(1, verbose=False)
    losses = Losses()
    trainer = pl.Trainer(
        strategy=strategy,  # the one line
        accelerator="cpu",
        devices=2,
        max_steps=10,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
    )
    trainer.fit(ByteGPT(dim=64, num_layers=2), PydocText())
    if trainer.is_global_zero:
        print(f"{strategy:6}", *(f"{loss:.4f}" for loss in losses.values), flush=True)
    return losses.values


if __name__ == "__main__":
    before, after = train("ddp"), train("zero2")
    difference = max(abs(a - b) for a, b in zip(before, after, strict=True))
    if difference > 1e-4:
        raise SystemExit(f"the losses differ by {difference}")
