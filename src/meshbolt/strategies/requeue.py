"""SLURM's signal before the time is up: save between two steps, all ranks at the same one.

Lightning saves and requeues from within the signal's handler, which interrupts each rank wherever it is: one in the forward of
a step and another already in the next one, with parameters gathered. Here the handler takes a note only, and Lightning's own
runs before the next window (the batches of one optimizer step) once any rank has been notified.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


class Requeue:
    """Watches for the signal during one fit; does nothing outside of SLURM jobs that requeue themselves."""

    def __init__(self, environment: Any, *, group: dist.ProcessGroup | None) -> None:
        """Take Lightning's handler of the signal, and put a notification in its place.

        Args:
            environment: the cluster's.
            group: of all ranks, for tensors on the CPU.
        """
        self._group = group
        self._notified: tuple[int, FrameType | None] | None = None
        self._handler: Callable[..., Any] | None = None
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal):
            return
        handler = signal.getsignal(environment.requeue_signal)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler, self._signal = handler, environment.requeue_signal
            # Lightning puts back what was there before when the run ends.
            signal.signal(self._signal, self._note)

    def before_window(self, trainer: pl.Trainer, batch_index: int) -> None:
        """Save and requeue if any rank was notified; a collective where a window begins.

        Args:
            trainer: knows how many batches a window has.
            batch_index: of the batch that comes next.
        """
        if self._handler is None or batch_index % trainer.accumulate_grad_batches:
            return
        notified = torch.tensor(float(self._notified is not None))
        dist.all_reduce(notified, op=dist.ReduceOp.MAX, group=self._group)
        if notified:
            self._handler(*(self._notified or (self._signal, None)))
            self._notified = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._notified = (signum, frame)
