"""A mark for callbacks that only look on."""

from __future__ import annotations

import lightning.pytorch as pl


class Onlooker(pl.Callback):
    """A callback that neither reads nor changes parameters, gradients or state, so that a strategy may go on with them meanwhile.

    Offloaded updates run beside hooks of such callbacks; they would wait for other callbacks with hooks between batches. Sizes,
    times and counts may be asked for.
    """
