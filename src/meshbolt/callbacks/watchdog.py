"""Ends a run in which ranks do not get on, with the name of the one that is to blame."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from typing_extensions import override

from meshbolt.callbacks.monitoring import open_records
from meshbolt.compat import end_connections, is_broken_connection, meeting_store
from meshbolt.errors import ConfigError, MeshboltError, StuckError
from meshbolt.monitoring.heartbeats import Heartbeats
from meshbolt.monitoring.interrupt import Interrupt
from meshbolt.monitoring.verdict import Verdict
from meshbolt.plugins import Onlooker

TIMEOUT_SECONDS, PAUSE_SECONDS = 600.0, 1800.0
# What may be as long as a pause at the beginning of a fit: the first step, which compiles, and the second, which may do so again.
_FIRST_STEPS = 2
# How long the main thread has to end with the error before the process is ended; and, once it was raised there, to get out.
LEAVE_SECONDS, UNWIND_SECONDS = 20.0, 60.0
_LOOK_SECONDS = 1.0
# How long the others have to hear of the verdict, before connections end: their errors are to be this one, too.
_TOGETHER_SECONDS = 0.3

_log = logging.getLogger(__name__)
_numbers = itertools.count()


class Watchdog(Onlooker):
    """Ends the run with `StuckError` when a rank does not get from one batch to the next in time, instead of waiting for ever.

    Then the stacks of all threads of every rank are printed to the standard error, by the rank that noticed, with what each was
    doing and its last collective by name; and the error names the rank that keeps the others waiting: one that sleeps, has
    died, or has skipped a collective. A thread of its own notices, so that it does not matter what the main one is stuck in.

    `timeout_seconds` holds for a batch of training or evaluation and what comes before the next one. For the first two batches
    of a fit it is `pause_seconds`, since compiling takes minutes. So it is around what a Trainer does between batches: setting
    up, starting the workers of loaders at the beginning of an epoch or an evaluation, the hooks at their ends, and saving a
    checkpoint. The defaults, 10 and 30 minutes, are those after which torch itself gives up waiting, with NCCL and with gloo, so
    that hardly a run is ended that would have gone on. Some ten times what your slowest step takes is a good choice.

    It costs two marks of a microsecond for each batch, and three small requests to the store of the ranks, at most every five
    seconds, from its own thread. Its error reaches code that sleeps, waits for a lock or for another rank over gloo. A process
    that cannot be reached so, as in a kernel of a GPU that does not end, is ended after 20 seconds, with exit code 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import Watchdog
        >>> trainer = Trainer(strategy="zero3", accelerator="cpu", devices=2, callbacks=[Watchdog(timeout_seconds=120)])
    """

    def __init__(
        self,
        timeout_seconds: float = TIMEOUT_SECONDS,
        *,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        """Check the settings.

        Args:
            timeout_seconds: the longest time for a batch.
            pause_seconds: the longest time for what is more than a batch, see above; not below the other.

        Raises:
            ConfigError: a time is not positive, or the two are the wrong way round.
        """
        if not 0 < timeout_seconds <= pause_seconds:
            raise ConfigError(
                f"Watchdog(timeout_seconds={timeout_seconds!r}, pause_seconds={pause_seconds!r}): both are to be positive, and a "
                "pause not shorter than a batch."
            )
        self.timeout_seconds, self.pause_seconds = timeout_seconds, pause_seconds
        self._beats: Heartbeats | None = None
        self._interrupt: Interrupt | None = None
        self._has_left = threading.Event()
        self._patient_steps = 0

    def __getstate__(self) -> dict[str, Any]:
        """Return what may go to another process: the settings."""
        return {"timeout_seconds": self.timeout_seconds, "pause_seconds": self.pause_seconds}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to watch.

        Raises:
            ConfigError: there are two of them.
        """
        if sum(isinstance(each, Watchdog) for each in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ConfigError("The Trainer has several callbacks of Watchdog. Keep one.")
        self._stop()
        self._has_left.clear()
        self._interrupt = interrupt = Interrupt()
        many = trainer.world_size > 1 and dist.is_initialized()
        self._beats = Heartbeats(
            rank=trainer.global_rank,
            world=trainer.world_size if many else 1,
            store=meeting_store() if many else None,
            key=f"meshbolt/watchdog/{next(_numbers)}",
            silence_seconds=self.timeout_seconds,
            arrival_seconds=self.pause_seconds,
            end=lambda verdict, text: self._end(trainer, verdict, text),
            step=lambda: trainer.global_step,
            stacks_file=interrupt.stacks_file,
            interval_seconds=min(5.0, self.timeout_seconds / 10),
        )
        self._mark("the set-up", self.pause_seconds)
        self._beats.start()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no more."""
        self._stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Watch no more; say which rank is gone where the error is one of a lost connection."""
        self._has_left.set()
        if self._beats is None:
            return
        if is_broken_connection(exception) and not isinstance(exception, StuckError):
            self._name_who_is_gone(trainer, exception, self._beats.lost_ranks(_LOOK_SECONDS))
        self._stop()

    def _name_who_is_gone(self, trainer: pl.Trainer, exception: BaseException, gone: Mapping[int, str]) -> None:
        if not gone:
            return
        words = "; ".join(f"rank {rank} {why}" for rank, why in gone.items())
        self._record(trainer, "rank gone", words)
        _log.error("Watchdog: %s.", words)
        if isinstance(exception, MeshboltError):
            exception.args = (f"{exception}\n{words}.",)

    def _stop(self) -> None:
        if self._beats is not None:
            self._beats.stop()
        if self._interrupt is not None:
            self._interrupt.remove()
        self._beats = self._interrupt = None

    # The end of a run that is stuck; in the thread of the heartbeats ---------------------------------------------------

    def _end(self, trainer: pl.Trainer, verdict: Verdict, text: str) -> None:
        words = f"The run is stuck: {verdict.why}."
        if text:
            self._record(trainer, "watchdog", f"{words}\n{text}")
            _say(f"meshbolt watchdog: {text}")
        error = StuckError(
            f"{words} The stacks of all ranks are in the output of the rank that noticed. If a step may take longer, give "
            f"Watchdog(timeout_seconds={self.timeout_seconds:g}) more time."
        )
        interrupt = self._interrupt
        if interrupt is not None:
            interrupt.raise_in_main(error)
        time.sleep(_TOGETHER_SECONDS)
        failures = getattr(trainer.strategy, "failures", None)
        if failures is not None:
            failures.end(error)
        else:
            end_connections()
        if self._has_left.wait(LEAVE_SECONDS):
            return
        if interrupt is not None and interrupt.has_raised.is_set():  # something has caught it, or takes its time to end
            interrupt.raise_in_main(error)
            if self._has_left.wait(UNWIND_SECONDS):
                return
        _say(
            f"meshbolt watchdog: {type(error).__name__}: {error}\n"
            f"Rank {trainer.global_rank} cannot be woken: its process is ended."
        )
        os._exit(1)

    def _record(self, trainer: pl.Trainer, what: str, text: str) -> None:
        for records in open_records(trainer):
            records.write("event", step=trainer.global_step, values={"what": what, "text": text})

    # Where a run is ---------------------------------------------------------------------------------------------------

    def _mark(self, doing: str, patience_seconds: float) -> None:
        if self._beats is not None:
            self._beats.mark(doing, patience_seconds=patience_seconds)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have patience with the first steps."""
        self._patient_steps = _FIRST_STEPS
        self._mark("the beginning of training", self.pause_seconds)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have patience with loaders that start."""
        self._patient_steps = max(1, self._patient_steps)
        self._mark("the beginning of an epoch", self.pause_seconds)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch is there."""
        self._mark("training on a batch", self.pause_seconds if self._patient_steps else self.timeout_seconds)
        self._patient_steps = max(0, self._patient_steps - 1)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch is done."""
        self._mark("loading the next batch, or callbacks", self.timeout_seconds)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have patience with hooks."""
        self._mark("the end of an epoch", self.pause_seconds)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have patience with what comes last."""
        self._mark("the end of training", self.pause_seconds)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have patience with disks."""
        self._mark("saving a checkpoint", self.pause_seconds)

    def _begin_evaluation(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._mark("the beginning or end of an evaluation", self.pause_seconds)

    def _begin_batch(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any, **__: Any) -> None:
        self._mark("an evaluation of a batch", self.timeout_seconds if batch_idx else self.pause_seconds)

    def _end_batch(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._mark("loading the next batch of an evaluation", self.timeout_seconds)

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = _begin_evaluation
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _begin_evaluation
    on_validation_end = on_test_end = on_predict_end = _begin_evaluation
    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin_batch
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _end_batch


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
