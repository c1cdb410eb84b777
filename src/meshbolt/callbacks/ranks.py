"""Which rank the others wait for, in every step, by how much and why."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from meshbolt.callbacks.clock import StepClock, StepTimes
from meshbolt.callbacks.fetching import FetchTimer
from meshbolt.callbacks.moment import Moment
from meshbolt.callbacks.monitoring import Monitor
from meshbolt.callbacks.summing import Part
from meshbolt.compat import waits_observed
from meshbolt.errors import ConfigError
from meshbolt.monitoring import Value
from meshbolt.monitoring.ranks import RankTimes, mean_of, spread_over
from meshbolt.units import format_seconds

# The first step allocates and compiles.
_FIRST_COUNTED = 2
# In how many logs in a row the same rank must be behind before it is said.
_IN_A_ROW = 3
_PARTS = ("step", "data", "waited")


class RankMonitor(Monitor):
    """Log which rank the others wait for, by how much, and whether for its data or for what it computes.

    A rank's own time is that of a step without what it waits for other ranks; the rank with the most is the slowest. A small sum
    over the ranks for each log, which all monitors of a Trainer share, brings them together in the background: numbers are logged
    with the step they are of, a step or more later. When the same rank is behind by more than `warn` in three logs in a row, a
    warning names it.

    On a CPU waits of every step are measured, on GPUs those of the last step before a log.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import RankMonitor
        >>> trainer = Trainer(strategy="zero2", accelerator="cpu", devices=2, callbacks=[RankMonitor(every=50)])
    """

    kind = "ranks"

    def __init__(self, *, every: int = 10, warn: float = 0.2, directory: str | Path | None = None) -> None:
        """Take the settings.

        Args:
            every: steps between two logs; see `Monitor`.
            warn: part of a step by which a rank is behind when it is worth a warning.
            directory: of the records; see `Monitor`.

        Raises:
            ConfigError: a number is none of that kind.
        """
        super().__init__(every=every, directory=directory)
        if not warn > 0:
            raise ConfigError(f"RankMonitor(warn={warn!r}) is no part of a step. Give a number above 0, such as 0.2.")
        self.warn = warn
        self.latest: dict[str, Value] = {}
        self._run: _Run | None = None
        self._watching = ExitStack()
        self._suspect, self._times_in_a_row = -1, 0
        self._named: set[int] = set()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the records, where it is about to train."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure."""
        super().on_train_start(trainer, pl_module)
        self._watching.close()
        self.latest, self._suspect, self._times_in_a_row, self._named = {}, -1, 0, set()
        self._run = run = _Run(trainer)
        device = trainer.strategy.root_device
        self._watching.enter_context(run.fetching.listening(trainer.profiler))  # type: ignore[attr-defined]
        self._watching.enter_context(waits_observed(device, self._waiting, self._waited))
        run.part = self.take_part(run.names, functools.partial(self._tell, trainer, run))
        run.clock.begin("between")
        self._watch_next(run)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was asked for last, and stop."""
        self._watching.close()
        run, self._run = self._run, None
        if run is None:
            return
        if run.part.wanted is not None:
            run.part.want(run.part.wanted, functools.partial(run.numbers, run.taken, wait=True))
        run.part.leave()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Measure no more."""
        super().on_exception(trainer, pl_module, exception)
        self._watching.close()
        self._run = None

    def _waiting(self) -> Any:
        return None if self._run is None else (self._run.clock.waiting(), perf_counter())

    def _waited(self, since: Any) -> None:
        if self._run is not None and since is not None:
            self._run.clock.waited(since[0])
            self._run.note_wait(perf_counter() - since[1])

    # A step -----------------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step, where the batch was its last, and log what is there of earlier ones."""
        run = self._run
        if run is None or not self.ends_step(trainer):
            return
        run.end_step()
        run.part.go_on(self.steps_taken)
        if self.is_due(self.steps_taken):
            run.part.want(self.moment, functools.partial(run.numbers, run.taken))
        self._watch_next(run)

    def _watch_next(self, run: _Run) -> None:
        """Watch the waits of the next step: on a GPU, where that takes events, of those before a log."""
        if not run.on_gpu or self.is_due(self.steps_taken + 1):
            run.clock.watch()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave validation out."""
        if self._run is not None:
            self._run.clock.pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on."""
        if self._run is not None:
            self._run.forget_fetches()
            self._run.clock.begin("between")

    def _tell(self, trainer: pl.Trainer, run: _Run, moment: Moment, sums: Mapping[str, float]) -> None:
        """Log times of all ranks."""
        ranks = [RankTimes(*(sums[f"{part}/{rank}"] for part in _PARTS)) for rank in range(len(run.hosts))]
        ranks = [each for each in ranks if each.step > 0]
        if len(ranks) < len(run.hosts):
            return  # a rank has measured no step yet
        self.latest = spread_over(ranks, run.hosts)
        own = [each.own for each in ranks]
        self.report(trainer, self.latest, moment=moment, own_seconds=own, data_seconds=[each.data for each in ranks])
        self._look_out(trainer, self.latest)

    def _look_out(self, trainer: pl.Trainer, values: dict[str, Value]) -> None:
        """Warn of a rank that is behind again and again, once."""
        rank, behind = int(values["ranks/slowest_rank"] or 0), float(values["ranks/behind_fraction"] or 0.0)
        is_behind = behind > self.warn
        self._times_in_a_row = (self._times_in_a_row if rank == self._suspect else 0) + 1 if is_behind else 0
        self._suspect = rank
        if self._times_in_a_row < _IN_A_ROW or rank in self._named:
            return
        self._named.add(rank)
        slowest, median = (
            format_seconds(float(values[f"ranks/{name}_seconds"] or 0.0)) for name in ("slowest", "median")
        )
        text = (
            f"Rank {rank} ({values['ranks/slowest_host']}) keeps the others waiting: of each step it takes {slowest} by itself, "
            f"others {median}. It differs in {values['ranks/slowest_part']}."
        )
        if self.records is not None and trainer.is_global_zero:
            self.records.write("event", step=trainer.global_step, values={"what": "slow rank", "text": text})
        rank_zero_warn(text)


class _Run:
    """What is measured of a fit."""

    part: Part

    def __init__(self, trainer: pl.Trainer) -> None:
        device = trainer.strategy.root_device
        self.clock, self.fetching = StepClock(device), FetchTimer()
        self.hosts = _hosts_of_all(trainer)
        self.names = [f"{part}/{rank}" for part in _PARTS for rank in range(len(self.hosts))]
        self.on_gpu = device.type == "cuda"
        self._times: list[RankTimes] = []
        self.taken, self._waited_for_others = 0, 0.0
        self._rank = trainer.global_rank

    def end_step(self) -> None:
        """End a step, and read those that are there."""
        self._read()
        self.taken += 1
        self.clock.end_step(self.taken, max(0.0, self.fetching.take() - self._waited_for_others))
        self._waited_for_others = 0.0

    def note_wait(self, seconds: float) -> None:
        """Take note of a wait for other ranks, which may be a part of getting a batch: ranks compare what they got."""
        if self.fetching.under_way:
            self._waited_for_others += seconds

    def forget_fetches(self) -> None:
        """Leave out what was got by validation."""
        self.fetching.take()
        self._waited_for_others = 0.0

    def _read(self, *, last: int | None = None, wait: bool = False) -> None:
        for times in self.clock.read(last=last, wait=wait):
            self._keep(times)

    def _keep(self, times: StepTimes) -> None:
        if times.number < _FIRST_COUNTED or times.exposed is None:
            return
        data = min(times.note, times.seconds)
        self._times.append(RankTimes(times.seconds, data, min(sum(times.exposed.values()), times.seconds - data)))

    def numbers(self, last: int, *, wait: bool = False) -> dict[str, float]:
        """Return the mean times of this rank since the last log, among zeros for the others; all zeros where it has none.

        Args:
            last: the number of the last step.
            wait: for what is still under way, at the end of a run.
        """
        self._read(last=last, wait=wait)
        mean = mean_of(self._times) if self._times else RankTimes(0.0, 0.0, 0.0)
        self._times.clear()
        return {**dict.fromkeys(self.names, 0.0), **{f"{part}/{self._rank}": getattr(mean, part) for part in _PARTS}}


def _hosts_of_all(trainer: pl.Trainer) -> list[str]:
    if trainer.world_size == 1 or not dist.is_initialized():
        return [socket.gethostname()]
    hosts: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts
