"""How far a fit has come, how fast it goes, and how long it will take: arithmetic, without printing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl

from meshbolt.units import format_seconds

SPAN_SECONDS = 10.0


class Position(NamedTuple):
    """How far a fit has come, in whichever unit it will end by."""

    unit: str
    done: int
    total: int | None

    def remaining_seconds(self, *, elapsed_seconds: float, done_at_start: int) -> float | None:
        """Return how long the rest takes at the pace so far; None where that cannot be known.

        Args:
            elapsed_seconds: since the start.
            done_at_start: more than 0 in a run that was resumed.
        """
        progress = self.done - done_at_start
        if self.total is None or progress <= 0:
            return None
        return elapsed_seconds * max(self.total - self.done, 0) / progress


def position_in_fit(trainer: pl.Trainer, *, batches_in_epoch: int) -> Position:
    """Return how far a fit has come: in steps where `max_steps` ends it, else in batches, or steps where that is the same.

    Under manual optimisation `max_steps` is of updates, each optimizer's counted, of which a batch may have several or none.

    Args:
        trainer: while it fits.
        batches_in_epoch: how many are done in the current epoch.
    """
    per_epoch, epochs = float(trainer.num_training_batches), trainer.max_epochs
    batches = math.inf if epochs in (None, -1) else per_epoch * float(epochs)
    is_manual = not trainer.lightning_module.automatic_optimization
    if 0 < trainer.max_steps * trainer.accumulate_grad_batches <= batches:
        return Position("update" if is_manual else "step", trainer.global_step, trainer.max_steps)
    before = int(per_epoch) * trainer.current_epoch if math.isfinite(per_epoch) else 0
    is_step = trainer.accumulate_grad_batches == 1 and not is_manual
    return Position(
        "step" if is_step else "batch", before + batches_in_epoch, int(batches) if math.isfinite(batches) else None
    )


def epoch_of(trainer: pl.Trainer) -> list[str]:
    """Return which epoch it is, in words; nothing where there is only one.

    Args:
        trainer: while it fits.
    """
    epochs = trainer.max_epochs
    if epochs == 1 or (epochs in (None, -1) and not trainer.current_epoch):
        return []
    return [f"epoch {trainer.current_epoch + 1}" + (f" of {epochs}" if epochs not in (None, -1) else "")]


class Speed:
    """Rates over the last ten seconds."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int, int]] = deque()

    def clear(self) -> None:
        """Forget everything: what comes next is not to be measured together with what was before."""
        self._marks.clear()

    def add(self, now_seconds: float, *, done: int, amount: int) -> None:
        """Take note of a batch that is done.

        Args:
            now_seconds: on a clock that only runs forward.
            done: steps or batches done in all.
            amount: tokens or samples in the batch, over all ranks.
        """
        self._marks.append((now_seconds, done, amount))
        while self._marks[-1][0] - self._marks[0][0] > SPAN_SECONDS and len(self._marks) > 2:
            self._marks.popleft()

    def texts(self, *, unit: str, amount_unit: str) -> list[str]:
        """Return the rates in words; none before there are two batches to measure between.

        Args:
            unit: what `done` counts.
            amount_unit: what `amount` counts.
        """
        if len(self._marks) < 2:
            return []
        seconds = self._marks[-1][0] - self._marks[0][0]
        done = self._marks[-1][1] - self._marks[0][1]
        amount = sum(mark[2] for mark in list(self._marks)[1:])
        rate = [f"{amount / seconds:,.0f} {amount_unit}/s"] if amount and seconds > 0 else []
        return [*rate, *([f"{format_seconds(seconds / done)}/{unit}"] if done > 0 else [])]


def format_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return each metric as its name and value.

    Args:
        metrics: numbers, tensors with one number, or text.
    """
    # A name may hold anything, and must not break a line or a terminal.
    return ["".join(filter(str.isprintable, f"{name} {_format(value)}")) for name, value in metrics.items()]


def _format(value: Any) -> str:
    if isinstance(value, (str, int)):
        return str(value)
    number = float(value)
    return f"{number:.4f}" if number == 0 or 1e-2 <= abs(number) < 1e4 else f"{number:.3g}"
