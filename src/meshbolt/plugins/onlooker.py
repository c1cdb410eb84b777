"""A mark for callbacks that only look on."""

from __future__ import annotations

import lightning.pytorch as pl


class Onlooker(pl.Callback):
    """A callback that neither reads nor changes parameters, gradients or state, so that a strategy may go on with them meanwhile.

    Offloaded updates run beside hooks of such callbacks; they would wait for other callbacks with hooks between batches. Sizes,
    times and counts may be asked for.
    """

    def before_sharding(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the module while it is whole: its values may not be there yet, its layers and shapes are.

        Args:
            trainer: about to run, with its ranks connected.
            pl_module: in the dtypes of the run, before anything is divided, cut, sharded or compiled.
        """
