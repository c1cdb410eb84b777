"""Signals that end a job: SLURM's before the time is up, and SIGTERM; acted on between two steps, by all ranks at the same one.

Lightning saves and requeues, or broadcasts, from within the signal's handler, which interrupts each rank wherever it is: one in
the forward of a step and another already in the next one, with parameters gathered and collectives under way that the handler's
own would be taken for. Here a handler takes a note only. A rank with a note leaves word in the store through which the ranks
once found each other; rank 0 finds it at the beginning of a window (the batches of one optimizer step) and writes there that
all act at the beginning of the next one. No rank gets that far without rank 0 having taken part in the window between, so that
each has read it in time. This costs a look into the store a window, and no collective. A signal waits for a validation to end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from meshbolt.strategies.compat import default_store, note_termination_instead


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
        self._agreements: dict[_Agreement, Callable[[], None]] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        ended = _Agreement(f"meshbolt/signals/{number}/terminate")
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
            asked = _Agreement(f"meshbolt/signals/{number}/requeue")
            self._agreements[asked] = lambda: handler(signum, None)
            signal.signal(signum, lambda *_: asked.ask())

    def _terminate(self) -> None:
        raise SIGTERMException


class _Agreement:
    """Lets all ranks do something at the beginning of the same window, after any of them has asked for it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._asks = False
        self._due: int | None = None

    def ask(self) -> None:
        """Ask for it; all that a handler does."""
        self._asks = True

    def is_due(self, window: int) -> bool:
        """Return whether it is to be done now; to be asked on every rank at the beginning of every window.

        Args:
            window: number of the window, counted from 1.
        """
        if self._due is None:
            self._due = self._agreed_window(window)
        return self._due == window

    def _agreed_window(self, window: int) -> int | None:
        if dist.get_world_size() == 1:
            return window if self._asks else None
        store = default_store()
        if self._asks:
            store.set(f"{self._name}/asked", "")
            self._asks = False
        agreed = f"{self._name}/window"
        if dist.get_rank() == 0 and store.check([f"{self._name}/asked"]):
            store.set(agreed, str(window + 1))
            store.get(agreed)  # the answer proves that it is written before anyone can ask
        return int(store.get(agreed)) if store.check([agreed]) else None
