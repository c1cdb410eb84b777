"""After an exception has ended a run: whether its ranks can still do something together, such as saving a checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerStatus
from torch import nn

from meshbolt.engine import Engine
from meshbolt.strategies.attendance import Attendance
from meshbolt.strategies.compat import trainer_of

_log = logging.getLogger(__name__)


class AfterExceptions:
    """The part of the Trainer's strategy that knows of exceptions; stands before `MeshCore` in the bases."""

    lightning_module: pl.LightningModule | None
    _attendance: Attendance
    _control_group: dist.ProcessGroup | None
    _engines: dict[nn.Module, Engine]
    _has_begun = False

    def _was_interrupted(self) -> bool:
        trainer = trainer_of(self.lightning_module)
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    def _reachable(self) -> dist.ProcessGroup | None:
        """Return the group of all ranks as far as they can be talked to; None where there is nobody to talk to."""
        if not self._was_interrupted():
            return super()._reachable()  # type: ignore[misc, no-any-return]
        if not self._has_begun:
            return None  # what would be saved is not even restored yet
        trainer: Any = trainer_of(self.lightning_module)
        group = self._attendance.group(steps=trainer.global_step, stays_away=self._has_lost_state)
        self._control_group = group or self._control_group
        return group

    def _has_lost_state(self) -> bool:
        """Return whether there is nothing to save: state that lies elsewhere could not be read or written, or is of two steps."""
        try:
            for engine in self._engines.values():
                engine.require_whole()
        except Exception as error:  # whatever an update has raised
            # The exception that ended the run is the one to be seen.
            _log.warning("Nothing is saved any more, for what could be is not whole: %s", error)
            return True
        return False
