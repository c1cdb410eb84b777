"""What ranks send each other, by axis of the mesh and collective, and how long they wait for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from meshbolt.callbacks.monitoring import Monitor
from meshbolt.compat import collectives_observed, gather_into, sum_into, works_observed
from meshbolt.monitoring.communication import OTHER, Row, Table, of_steps, waited
from meshbolt.units import MIB

# Large enough to be limited by bandwidth, small enough for a pause before the first step that nobody notices.
_CEILING_BYTES = {"cpu": 4 * MIB, "cuda": 64 * MIB}
_REPEATS = 3


class CommunicationMonitor(Monitor):
    """Log calls, bytes and waiting of each collective over each axis of the mesh.

    Every rank records a table of its own since the last log: for each axis and collective its calls, bytes, time from call to
    the end of the wait for it, of that the wait, bytes per second, and what the same collective had alone before the first step:
    the ceiling of this machine. An axis that all ranks stand along has the Trainer's own messages too. Under NCCL, where no rank
    waits but its device, times are not known; see `ThroughputMonitor` for what the device waits. `docs/metrics.md` has every
    name.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import CommunicationMonitor
        >>> trainer = Trainer(callbacks=[CommunicationMonitor(every=20)])
    """

    kind = "communication"

    def __init__(self, *, every: int = 10, ceiling: bool = True, directory: str | Path | None = None) -> None:
        """Take the settings.

        Args:
            every: steps between two logs; see `Monitor`.
            ceiling: measure what collectives can do on this machine, before the first step.
            directory: of the records; see `Monitor`.

        Raises:
            ConfigError: there is no such number of steps.
        """
        super().__init__(every=every, directory=directory)
        self.ceiling = ceiling
        self._run: _Run | None = None
        self._watching = ExitStack()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the records, where it is about to train."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure ceilings, and begin to watch; alone there is nothing to watch."""
        super().on_train_start(trainer, pl_module)
        if not dist.is_initialized() or trainer.world_size == 1:
            return
        groups = _groups_of(trainer.strategy)
        self._run = run = _Run({group.group_name: axis for axis, group in groups.items()})
        if self.ceiling:
            run.table.ceilings = _ceilings(groups, trainer.strategy.root_device)
        self._watching.enter_context(collectives_observed(run.started))
        self._watching.enter_context(works_observed(run.begins_to_wait, run.has_waited))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, where the batch was its last, and log where it is time to."""
        if self._run is None or not self.ends_step(trainer):
            return
        self._run.steps += 1
        if self.is_due(self.steps_taken):
            self._log(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave validation out."""
        if self._run is not None:
            self._run.is_paused = True

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on."""
        if self._run is not None:
            self._run.is_paused = False

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what came since the last log, and stop."""
        self._watching.close()
        if self._run is not None and self._run.steps:
            self._log(trainer)
        self._run = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop."""
        super().on_exception(trainer, pl_module, exception)
        self._watching.close()
        self._run = None

    def _log(self, trainer: pl.Trainer) -> None:
        if self._run is None:
            return
        rows, steps = self._run.table.take(), self._run.steps
        self._run.steps = 0
        values = of_steps(rows, steps=steps)
        written = list(self._run.table.written(rows))
        self.report(trainer, values, rows=written, steps=steps)


class _Run:
    """What was seen since the last log.

    Args:
        axes: by the name of a group, which axis it is.
    """

    def __init__(self, axes: dict[str, str]) -> None:
        self.table, self.steps = Table(), 0
        self.is_paused = False
        self._axes = axes
        self._started: weakref.WeakKeyDictionary[Any, tuple[Row, float]] = weakref.WeakKeyDictionary()

    def started(self, collective: str, group: Any, num_bytes: int, work: Any, begun_seconds: float) -> None:
        """Note a call."""
        if self.is_paused:
            return
        axis = self._axes.get(group.group_name, OTHER)
        # Works of NCCL end for their device, not for who waits.
        is_timed = work is not None and dist.get_backend(group) == "gloo"
        row = self.table.started(axis, collective, num_bytes, is_timed=is_timed)
        if is_timed:
            self._started[work] = row, begun_seconds

    def begins_to_wait(self, work: Any) -> tuple[Row, float, float] | None:
        """Note that a wait begins."""
        noted = self._started.pop(work, None)
        return None if noted is None else (*noted, perf_counter())

    def has_waited(self, noted: tuple[Row, float, float] | None) -> None:
        """Note that it has ended."""
        if noted is not None:
            row, begun_seconds, wait_seconds = noted
            waited(row, begun_seconds=begun_seconds, wait_seconds=wait_seconds, ended_seconds=perf_counter())


def _groups_of(strategy: Any) -> dict[str, Any]:
    """Return the groups of axes along which several ranks stand."""
    mesh = getattr(strategy, "device_mesh", None)
    if not isinstance(mesh, DeviceMesh):
        return {OTHER: dist.group.WORLD}
    groups = {name: mesh.get_group(name) for name in mesh.mesh_dim_names or ()}
    return {name: group for name, group in groups.items() if group.size() > 1}


def _ceilings(groups: dict[str, Any], device: torch.device) -> dict[tuple[str, str], float]:
    """Measure what each collective can do over each axis, in bytes of the larger side per second.

    All ranks of a group get the same numbers: those of its slowest one.
    """
    found: dict[tuple[str, str], float] = {}
    for axis, group in groups.items():
        for collective, run in _collectives(group, device).items():
            seconds = torch.tensor(_fastest(run, device), device=device, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
            found[axis, collective] = _payload(group, device) / float(seconds)
        found[axis, "send"] = found[axis, "recv"] = found.pop((axis, "message"))
    return found


def _payload(group: dist.ProcessGroup, device: torch.device) -> int:
    size = _CEILING_BYTES.get(device.type, 4 * MIB)
    return size // (4 * group.size()) * 4 * group.size()


def _collectives(group: Any, device: torch.device) -> dict[str, Callable[[], Any]]:
    whole = torch.zeros(_payload(group, device) // 4, device=device)
    part, other = whole.new_zeros(whole.numel() // group.size()), torch.zeros_like(whole)

    def message() -> None:
        rank = group.rank()
        if rank == 0:
            dist.send(whole, group=group, group_dst=1)
        elif rank == 1:
            dist.recv(whole, group=group, group_src=0)

    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: gather_into(whole, part, group=group),
        "reduce_scatter": lambda: sum_into(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, group=group, group_src=0),
        "message": message,
    }


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        since = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - since)
    return min(times[1:])
