"""What the monitors of one fit have in common: how they count steps, one sum over ranks, and one row of a logger for a step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import lightning.pytorch as pl

from meshbolt.callbacks.moment import Moment, stepped_batches
from meshbolt.callbacks.summing import SharedSums


class Together:
    """What the monitors of a fit share; made when it begins to train.

    Args:
        trainer: that fits.

    Attributes:
        steps: how many were taken, with those before a resume. A step is the batches from one update of parameters to the
            next: it ends with a batch in which an optimizer has stepped, however often, and however many of them.
        moment: at which the last one ended; before the first, at which training began.
        sums: over all ranks.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.steps = _steps_before(trainer)
        self.sums = SharedSums()
        self.moment = Moment.now(trainer)
        self._rows: dict[int, dict[str, float]] = {}

    def end_batch(self, trainer: pl.Trainer) -> None:
        """Count the step, where the batch that ends is its last; whoever calls it first after a batch counts for all."""
        if trainer.global_step == self.moment.step:
            return
        self.moment = Moment.now(trainer)
        self.steps += 1
        self._write_rows(trainer, before=self.moment.logger_step)

    def add_to_row(self, numbers: Mapping[str, float], *, logger_step: int) -> None:
        """Let loggers hear of numbers, in one row with all others of that step.

        Args:
            numbers: by name.
            logger_step: see `Moment`.
        """
        self._rows.setdefault(logger_step, {}).update(numbers)

    def write_rows(self, trainer: pl.Trainer) -> None:
        """Let loggers hear of all that they have not heard of."""
        self._write_rows(trainer, before=None)

    def _write_rows(self, trainer: pl.Trainer, *, before: int | None) -> None:
        """Write rows that are whole: of steps before one, for which no sum is wanted."""
        oldest = self.sums.oldest
        if before is not None and oldest is not None:
            before = min(before, oldest.logger_step)
        for step in [step for step in sorted(self._rows) if before is None or step < before]:
            tell_loggers(trainer, self._rows.pop(step), step=step)


def tell_loggers(trainer: pl.Trainer, numbers: Mapping[str, float], *, step: int) -> None:
    """Let all loggers of a trainer hear of numbers."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step=step)


_together: weakref.WeakKeyDictionary[pl.Trainer, Together] = weakref.WeakKeyDictionary()


def together_of(trainer: pl.Trainer) -> Together:
    """Return what the monitors of a fit share, the same for all; called when it begins to train."""
    if trainer not in _together:
        _together[trainer] = Together(trainer)
    return _together[trainer]


def part_ways(trainer: pl.Trainer) -> None:
    """Forget what the monitors of a fit share, when it has ended, however it has; loggers hear the rest."""
    together = _together.pop(trainer, None)
    if together is not None:
        together.write_rows(trainer)


def _steps_before(trainer: pl.Trainer) -> int:
    """Return how many steps were taken before a resume.

    Under manual optimisation nobody has counted them: there are at most as many as batches, and as updates.
    """
    updates, batches = trainer.global_step, stepped_batches(trainer)
    is_counted = trainer.lightning_module.automatic_optimization
    return updates if is_counted or not batches else min(updates, batches)
