"""What all monitors share: where their records are, which loggers hear of them, and how often."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from meshbolt.callbacks.moment import Moment
from meshbolt.callbacks.summing import Part, Tell
from meshbolt.callbacks.together import Together, part_ways, tell_loggers, together_of
from meshbolt.collectives import agree_on_error
from meshbolt.errors import ConfigError
from meshbolt.monitoring import Records, Value, find_metric
from meshbolt.monitoring.records import DIRECTORY
from meshbolt.plugins import Onlooker

# All monitors of a trainer write to one file a rank: by trainer, and by the directory that was asked for.
_shared: weakref.WeakKeyDictionary[pl.Trainer, dict[str, Records]] = weakref.WeakKeyDictionary()


class Monitor(Onlooker):
    """Base of callbacks that measure: subclasses take numbers from hooks of Lightning, and hand them to `report`.

    Every number goes to the records, one file a rank in a directory of the run; those of rank 0 also go to the Trainer's
    loggers, if it has any. Names must be in `meshbolt.monitoring.CATALOGUE`.

    Attributes:
        kind: what records are called.
        steps_taken: how many steps this fit has taken that this monitor knows of, with those before a resume: see `Together`.
        moment: at which the last of them ended.
    """

    kind: ClassVar[str]

    def __init__(self, *, every: int = 10, directory: str | Path | None = None) -> None:
        """Take the settings.

        Args:
            every: steps between two logs. A step is the batches from one update of parameters to the next, by however many
                optimizers.
            directory: of the records; None: "meshbolt_records" in the logger's directory of this run, or in the Trainer's
                `default_root_dir`. Rank 0's counts for all.

        Raises:
            ConfigError: there is no such number of steps.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"{type(self).__name__}(every={every!r}) is not a number of steps. Use 1 or more.")
        self.every, self.directory = every, directory
        self.records: Records | None = None
        self.steps_taken, self.moment = 0, Moment(0, 0)
        self._together: Together | None = None
        self._taken: set[str] = set()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the records, on all ranks or on none.

        Raises:
            ConfigError: there are two callbacks of this class, or records cannot be written.
        """
        twins = [each for each in trainer.callbacks if type(each) is type(self)]  # type: ignore[attr-defined]
        if len(twins) > 1:
            name = type(self).__name__
            raise ConfigError(
                f"The Trainer has {len(twins)} callbacks of {name}, which would log under one name. Keep one."
            )
        self.records = shared_records(trainer, self.directory)
        part_ways(trainer)  # of a fit before

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count steps; what a subclass does comes after this."""
        self._together = together_of(trainer)
        self.steps_taken, self.moment = self._together.steps, self._together.moment

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the other monitors of this fit, without a word to other ranks."""
        self._together = None
        # A logger that fails, too, is not to hide the exception.
        with contextlib.suppress(Exception):
            part_ways(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the other monitors of this fit, and let go of the records; the last monitor closes them."""
        self.records = self._together = None
        part_ways(trainer)
        monitors = (each for each in trainer.callbacks if isinstance(each, Monitor))  # type: ignore[attr-defined]
        if all(each.records is None for each in monitors):
            close_records(trainer)

    def take_part(self, names: Sequence[str], tell: Tell) -> Part:
        """Take part in the sums over ranks that all monitors of this fit share; all ranks call it, after `on_train_start`.

        Args:
            names: of the numbers to be added up.
            tell: is called with the moment that sums are of, and the sums by name.
        """
        if self._together is None:
            raise AssertionError("Nothing is summed up before training begins.")
        return self._together.sums.join(names, tell)

    def ends_step(self, trainer: pl.Trainer) -> bool:
        """Return whether the batch that ends is the last of a step; called once, in `on_train_batch_end`.

        Args:
            trainer: while it trains.
        """
        if self._together is None:
            return False
        self._together.end_batch(trainer)
        before, self.steps_taken = self.steps_taken, self._together.steps
        self.moment = self._together.moment
        return self.steps_taken != before

    def is_due(self, step: int) -> bool:
        """Return whether to log after this step.

        Args:
            step: how many are taken with it, as `steps_taken` is after it.
        """
        return step > 0 and step % self.every == 0

    def report(
        self,
        trainer: pl.Trainer,
        values: Mapping[str, Value],
        *,
        kind: str | None = None,
        moment: Moment | None = None,
        **further: Any,
    ) -> None:
        """Write values to this rank's records and, on rank 0, to the loggers; nothing is communicated.

        A logger hears of all numbers of a step in one call, when the last of them is there.

        Args:
            trainer: whose step it is.
            values: by their names in the catalogue. Texts and None go to the records only, as no logger draws them.
            kind: of the record; None: this monitor's.
            moment: of the run that they are about; None: the last step's.
            further: what else belongs to the record; see `Records.write`.

        Raises:
            ConfigError: a name is not in the catalogue.
        """
        for name in values:
            find_metric(name)
        if moment is None:
            moment = self.moment if self.moment.step == trainer.global_step else Moment.now(trainer)
        if self.records is not None:
            self.records.write(kind or self.kind, step=moment.step, values=values, **further)
        if trainer.is_global_zero and trainer.loggers:
            self._tell_loggers(trainer, values, moment)

    def _tell_loggers(self, trainer: pl.Trainer, values: Mapping[str, Value], moment: Moment) -> None:
        taken = (values.keys() & trainer.callback_metrics.keys()) - self._taken
        if taken:
            self._taken |= taken
            rank_zero_warn(
                f"The module logs {', '.join(sorted(taken))}, and so does {type(self).__name__}. Loggers get the module's; the "
                "monitor's are in its records only. Log under another name to have both."
            )
        numbers = {
            name: value for name, value in values.items() if isinstance(value, (int, float)) and name not in self._taken
        }
        if numbers and self._together is not None:
            self._together.add_to_row(numbers, logger_step=moment.logger_step)
        elif numbers:
            tell_loggers(trainer, numbers, step=moment.logger_step)


def shared_records(trainer: pl.Trainer, directory: str | Path | None) -> Records:
    """Return this rank's records, the same for every monitor of a trainer; all ranks call it together.

    Args:
        trainer: with its ranks connected.
        directory: what the monitor was told; None for the usual one.

    Raises:
        ConfigError: they cannot be written, on this rank or on another.
    """
    opened = _shared.setdefault(trainer, {})
    usual = str(Path(str(trainer.log_dir or trainer.default_root_dir)) / DIRECTORY) if directory is None else None
    asked = usual if usual is not None else str(directory)
    asked, run = trainer.strategy.broadcast((asked, f"{time.time():.6f}"))
    if asked not in opened:
        own: list[Records] = []
        run = next(iter(opened.values())).run if opened else run

        def try_to_open() -> None:
            own.append(Records(asked, trainer.global_rank, run=run))

        agree_on_error(try_to_open) if dist.is_initialized() else try_to_open()
        opened[asked] = own[0]
    return opened[asked]


def open_records(trainer: pl.Trainer) -> list[Records]:
    """Return the records that monitors of a trainer have open; none where there are no monitors."""
    return list(_shared.get(trainer, {}).values())


def close_records(trainer: pl.Trainer) -> None:
    """Close the records of a trainer."""
    for records in _shared.pop(trainer, {}).values():
        records.close()
