"""The progress bar that a Trainer gets without being asked: meshbolt's, in the place of the one that Lightning chooses.

Lightning takes its rich bar as soon as rich can be imported, which it can be wherever meshbolt is installed; redirected to a
file, that bar writes nothing until the end. A bar that was asked for stays, of whatever class it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from meshbolt.strategies.compat import callbacks_of_trainer_in_the_making, trainer_of

# Lightning adds its bar to the very list that it was given, which may be given to another Trainer later.
_chosen_by_lightning: WeakSet[ProgressBar] = WeakSet()


class OwnProgress:
    """The part of the Trainer's strategy that exchanges the bar; stands before the other bases.

    Attributes:
        default_progress_bar: makes the bar; None leaves Lightning's.
    """

    default_progress_bar: ClassVar[Callable[[], ProgressBar] | None] = None
    _asked_for: list[ProgressBar]
    _replaceable: ProgressBar | None = None

    def _configure_launcher(self) -> None:
        """Take note of the callbacks that a Trainer is being made with, before it adds its own."""
        bars = (each for each in callbacks_of_trainer_in_the_making() if isinstance(each, ProgressBar))
        self._asked_for = [each for each in bars if each not in _chosen_by_lightning]
        super()._configure_launcher()  # type: ignore[misc]

    def connect(self, model: pl.LightningModule) -> None:
        """Find Lightning's own bar, before a module adds one of the user's.

        Args:
            model: about to be run.
        """
        super().connect(model)  # type: ignore[misc]
        trainer = trainer_of(model)
        bars = _bars(trainer) if trainer is not None else []
        # By identity: a callback may compare as it likes.
        if len(bars) == 1 and not any(bars[0] is each for each in self._asked_for):
            self._replaceable = bars[0]
            _chosen_by_lightning.add(bars[0])

    def setup_environment(self) -> None:
        """Exchange the bar, before it is told of the run."""
        trainer: Any = trainer_of(getattr(self, "_user_module", None))
        bar, make = self._replaceable, type(self).default_progress_bar
        if trainer is not None and bar is not None and make is not None and _bars(trainer) == [bar]:
            trainer.callbacks = [make() if each is bar else each for each in trainer.callbacks]
        self._replaceable = None
        super().setup_environment()  # type: ignore[misc]


def _bars(trainer: pl.Trainer) -> list[ProgressBar]:
    return [each for each in trainer.callbacks if isinstance(each, ProgressBar)]  # type: ignore[attr-defined]
