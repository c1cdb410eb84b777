"""Signals that end a job: SLURM's before the time is up, and SIGTERM; acted on between two steps, by all ranks at the same one.

Lightning saves and requeues, or broadcasts, from within the signal's handler, which interrupts each rank wherever it is: one in
the forward of a step and another already in the next one, with parameters gathered and collectives under way that the handler's
own would be taken for. Here a handler takes a note only, and all ranks act on it at the beginning of a window, as `agreements.py`
has it. A signal waits for a validation to end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from meshbolt.strategies.agreements import Agreement
from meshbolt.strategies.compat import note_termination_instead, skip_broadcast_of_termination


class Signals:
    """Watches for signals during one fit; Lightning puts back what was there before when the fit ends."""

    def __init__(self, trainer: pl.Trainer, *, number: int) -> None:
        """Put notes in the place of Lightning's handlers.

        Args:
            trainer: whose handlers are registered already.
            number: of this fit in the process; equal on all ranks.
        """
        self._trainer = trainer
        self._window = 0
        self._agreements: dict[Agreement, Callable[[], None]] = {}
        # On every rank, whatever handlers of the user's a rank has: it is a collective.
        skip_broadcast_of_termination(trainer)
        if threading.current_thread() is not threading.main_thread():
            return
        ended = Agreement(f"meshbolt/signals/{number}/terminate")
        self._agreements[ended] = self._terminate
        note_termination_instead(trainer, ended.ask)
        environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._watch_for_requeue(environment.requeue_signal, number)

    def before_batch(self, index: int) -> None:
        """Act on what all ranks have agreed on, where a window begins.

        Args:
            index: of the batch that comes next, in its epoch.

        Raises:
            SIGTERMException: the job was terminated; on all ranks at the same batch.
        """
        if index % self._trainer.accumulate_grad_batches:
            return
        self._window += 1
        for agreement, act in self._agreements.items():
            if agreement.is_due(self._window):
                act()

    def _watch_for_requeue(self, signum: Any, number: int) -> None:
        handler = signal.getsignal(signum)
        if callable(handler):
            asked = Agreement(f"meshbolt/signals/{number}/requeue")
            self._agreements[asked] = lambda: handler(signum, None)
            signal.signal(signum, lambda *_: asked.ask())

    def _terminate(self) -> None:
        raise SIGTERMException
