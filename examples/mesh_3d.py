"""Three dimensions on eight ranks: two pipeline stages, layers divided between two ranks, and two ranks of data parallelism.

    python examples/mesh_3d.py

The model knows of none of it. `configs/mesh_3d.yaml` is the same as a configuration, which `meshbolt explain` shows.
"""

from __future__ import annotations

import lightning.pytorch as pl

from meshbolt import MeshStrategy
from meshbolt.callbacks import LogProgress
from meshbolt.demos import ByteGPT, PydocText


def main() -> None:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        # strategy="mesh_3d" is MeshStrategy(pipeline_parallel=2, tensor_parallel=2, zero=1).
        strategy=MeshStrategy(pipeline_parallel=2, tensor_parallel=2, zero=1),
        accelerator="cpu",
        devices=8,
        max_steps=10,
        gradient_clip_val=1.0,  # over all eight, each parameter counted once
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[LogProgress(interval_seconds=2)],
    )
    trainer.fit(ByteGPT(dim=32, num_layers=4), PydocText(batch_size=8))


if __name__ == "__main__":
    main()
