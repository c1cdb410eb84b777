"""A small GPT four times: its optimizer's state with the parameters, in host memory, in a file, and the parameters there too.

    python examples/offload.py

All print the same losses: an update computes the same wherever the state lies. On a GPU the first run takes the most of its
memory, the last the least of the host's.
"""

from __future__ import annotations

import tempfile

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from meshbolt import MeshStrategy, Offload
from meshbolt.demos import ByteGPT, PydocText


class Small(ByteGPT):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Offloaded states are updated by torch's fused kernels, to which others are equal but for rounding.
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


class Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def train(offload: Offload | None) -> list[float]:
    pl.seed_everything(1, verbose=False)
    losses, text = Losses(), PydocText()
    text.setup("fit")
    trainer = pl.Trainer(
        strategy=MeshStrategy(zero=3, offload=offload),
        accelerator="auto",
        devices=1,
        max_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[losses],
    )
    trainer.fit(Small(dim=64, num_layers=2), DataLoader(text.train_dataloader().dataset, batch_size=8))
    return losses.values


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as disk:
        runs = {
            "with the parameters": train(None),
            "in host memory": train(Offload("cpu")),
            "in a file": train(Offload("nvme", path=disk)),
            "all in files": train(Offload("nvme", parameters="nvme", path=disk)),
        }
    for place, losses in runs.items():
        print(f"{place:20}", " ".join(f"{loss:.4f}" for loss in losses))
    if max(abs(a - b) for each in runs.values() for a, b in zip(each, runs["in a file"], strict=True)) > 1e-3:
        raise SystemExit("The losses differ.")
