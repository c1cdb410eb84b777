"""A moment of a run, as records and loggers count."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl


@dataclass(frozen=True)
class Moment:
    """A moment of a run, which is told of a little later where numbers come late.

    Attributes:
        step: Lightning's `global_step`, which counts each update by each optimizer.
        logger_step: under which Lightning logs what a module logs; with several optimizers it is another one.
    """

    step: int
    logger_step: int

    @classmethod
    def now(cls, trainer: pl.Trainer) -> Moment:
        """Return this moment."""
        return cls(trainer.global_step, stepped_batches(trainer))


def stepped_batches(trainer: pl.Trainer) -> int:
    """Return how many batches have ended a window, as Lightning counts: under manual optimisation all."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))
