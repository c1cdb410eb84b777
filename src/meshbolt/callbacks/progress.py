"""Progress that reads well on a terminal and in a log file: a panel that is redrawn, or a line every few seconds."""

from __future__ import annotations

from time import monotonic
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override

from meshbolt.callbacks.amount import amount_in, data_parallel_size
from meshbolt.callbacks.closing_table import peak_memory_bytes
from meshbolt.callbacks.describe import describe_ranks, describe_strategy
from meshbolt.callbacks.pace import Speed, epoch_of, format_metrics, position_in_fit
from meshbolt.callbacks.screens import Screen, Status, open_screen
from meshbolt.units import format_bytes, format_seconds


class LogProgress(ProgressBar):
    """Show progress on rank 0, in place of Lightning's bar, which writes nothing into a file until the end.

    On a terminal a panel is redrawn; elsewhere (a file, a pipe, a notebook, `TERM=dumb`) a line is added every few seconds:
    step, time that is left, what was logged with `prog_bar=True`, speed, and the most memory that rank 0 has held. `NO_COLOR` is
    honoured. A Trainer with meshbolt's strategy has it without being asked, where it would have a bar of Lightning's choice:
    `enable_progress_bar=False` switches it off, and a bar in `callbacks=[...]` takes its place.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import LogProgress
        >>> trainer = Trainer(callbacks=[LogProgress(interval_seconds=30)])
    """

    def __init__(self, interval_seconds: float = 5.0) -> None:
        """Take the pace.

        Args:
            interval_seconds: time between two lines where output is not a terminal.
        """
        super().__init__()
        self.interval_seconds = interval_seconds
        self._enabled = True
        self._screen: Screen | None = None
        self._speed = Speed()
        self._start_seconds = 0.0
        self._done_at_start: int | None = None
        self._has_shown = False
        self._evaluated = 0

    # What Lightning asks of a progress bar ----------------------------------------------------------------------------

    @property
    def is_enabled(self) -> bool:
        """Whether this rank shows anything."""
        return self._enabled and (self._trainer is None or self._trainer.is_global_zero)

    @override
    def disable(self) -> None:
        """Show nothing from now on."""
        self._close()
        self._enabled = False

    @override
    def enable(self) -> None:
        """Show progress again; other ranks than 0 stay silent."""
        self._enabled = True

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line without breaking what is drawn."""
        self._open().say(str(kwargs.get("sep", " ")).join(map(str, args)))

    @override
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what was logged with `prog_bar=True`."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    # Training ---------------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what begins."""
        if not self.is_enabled:
            return
        self._speed.clear()
        self._start_seconds, self._done_at_start, self._has_shown = monotonic(), None, False
        resumed = f", from step {trainer.global_step}" if trainer.global_step else ""
        self._open().say(f"training with {describe_strategy(trainer)} on {describe_ranks(trainer)}{resumed}")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember where a run that was resumed begins."""
        if self._done_at_start is None:
            self._done_at_start = position_in_fit(trainer, batches_in_epoch=batch_idx).done

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step, where it is time to or it is the last one."""
        if not self.is_enabled:
            return
        where = position_in_fit(trainer, batches_in_epoch=batch_idx + 1)
        amount = amount_in(batch)
        count, unit = (amount.count * data_parallel_size(trainer), amount.unit) if amount else (0, "")
        self._speed.add(monotonic(), done=where.done, amount=count)
        is_first = not self._has_shown and where.done > (self._done_at_start or 0)
        if not (is_first or self._open().is_due() or where.done == where.total):
            return
        self._has_shown = True
        remaining = where.remaining_seconds(
            elapsed_seconds=monotonic() - self._start_seconds, done_at_start=self._done_at_start or 0
        )
        self._open().show(
            Status(
                activity="training",
                unit=where.unit,
                done=where.done,
                total=where.total,
                remaining=f"{format_seconds(remaining)} left" if remaining and remaining >= 1 else "",
                metrics=[*epoch_of(trainer), *format_metrics(self.get_metrics(trainer, pl_module))],
                rates=[*self._speed.texts(unit=where.unit, amount_unit=unit), _memory(trainer)],
            )
        )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where it ended."""
        if self.is_enabled:
            self._open().finish("training")
            took = format_seconds(monotonic() - self._start_seconds)
            self._open().say(f"trained to step {trainer.global_step} in {took}")
            self._close()

    # Evaluation -------------------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from the first batch."""
        self._evaluated = 0

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from the first batch."""
        self._evaluated = 0

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from the first batch."""
        self._evaluated = 0

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Show the batch, where it is time to."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._show_evaluation("validation", batches)

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Show the batch, where it is time to."""
        self._show_evaluation("test", trainer.num_test_batches)

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Show the batch, where it is time to."""
        self._show_evaluation("prediction", trainer.num_predict_batches)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what validation found."""
        if not self.is_enabled:
            return
        self._speed.clear()
        self._open().finish("validation")
        when = "before training" if trainer.sanity_checking else f"at step {trainer.global_step}"
        # Every rank has computed the means over the epoch by now, so that reading them starts no collective.
        metrics = self.get_metrics(trainer, pl_module) or trainer.callback_metrics
        self._open().say(" | ".join([f"validation {when}", *format_metrics(metrics)]))

    def _show_evaluation(self, activity: str, batches: Any) -> None:
        self._evaluated += 1
        if not self.is_enabled or not self._open().is_due():
            return
        total = sum(batches) if isinstance(batches, list) else batches
        known = int(total) if total != float("inf") else None
        self._open().show(Status(activity=activity, unit="batch", done=self._evaluated, total=known))

    # Screen -----------------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _open(self) -> Screen:
        if self._screen is None:
            self._screen = open_screen(interval_seconds=self.interval_seconds)
        return self._screen

    def _close(self) -> None:
        if self._screen is not None:
            self._screen.close()
        self._screen = None


def _memory(trainer: pl.Trainer) -> str:
    return f"peak memory {format_bytes(peak_memory_bytes(trainer.strategy.root_device))}"
