"""Every setting by name: ZeRO-3 with recomputed activations, units of one's own choice, and whole weights to look at.

python examples/full_control.py
"""

from __future__ import annotations

import lightning.pytorch as pl

from meshbolt import MeshStrategy, Recompute, Zero
from meshbolt.callbacks import ClosingTable, LogProgress
from meshbolt.demos import ByteGPT, PydocText


class LargestWeight(pl.Callback):
    """Looks at a whole matrix, of which each rank holds a part."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # All ranks gather together; changes made in place would be kept.
        with trainer.strategy.gathered(pl_module.head):
            largest = float(pl_module.head.weight.detach().abs().max())
        pl_module.print(f"largest weight of the head, {tuple(pl_module.head.weight.shape)}: {largest:.3f}")


def main() -> None:
    pl.seed_everything(1, verbose=False)
    strategy = MeshStrategy(
        zero=Zero(stage=3, unit=["Block"]),  # each Block is gathered by itself
        recompute=Recompute("selective", every=2),  # every second one computes its activations again in backward
    )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_steps=12,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        limit_val_batches=4,
        val_check_interval=12,
        logger=False,
        enable_checkpointing=False,
        callbacks=[LogProgress(interval_seconds=2), LargestWeight(), ClosingTable()],
    )
    trainer.fit(ByteGPT(dim=64, num_layers=4), PydocText())


if __name__ == "__main__":
    main()
