"""Train under ZeRO-2, write the weights as safetensors, and load them where meshbolt is not needed.

python examples/export_weights.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file

import meshbolt
from meshbolt.checkpoint.formats import export_checkpoint
from meshbolt.demos import ByteGPT, PydocText


def main() -> None:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        strategy="zero2",
        accelerator="cpu",
        devices=2,
        max_steps=10,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(ByteGPT(dim=64, num_layers=2), PydocText())
    folder = Path(trainer.strategy.broadcast(tempfile.mkdtemp()))  # the same for both ranks
    trainer.save_checkpoint(folder / "run.ckpt")
    if not trainer.is_global_zero:
        return

    # The whole model, built in this process alone: hyperparameters and weights come from the directory.
    model = meshbolt.load_from_checkpoint(ByteGPT, folder / "run.ckpt")

    # As `meshbolt checkpoint export run.ckpt weights.safetensors --to safetensors` does.
    done = export_checkpoint(folder / "run.ckpt", folder / "weights.safetensors", to="safetensors")
    print(f"{done.num_tensors} tensors, {done.num_bytes} bytes in {Path(done.out).name}")

    weights = load_file(folder / "weights.safetensors")
    same = all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    print(f"the same as in the checkpoint: {same}")


if __name__ == "__main__":
    main()
