"""The last words of a fit: what it ran as, how fast, and how much memory each rank took."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
import torch.distributed as dist
from typing_extensions import override

from meshbolt.callbacks.amount import Amount, amount_in, data_parallel_size
from meshbolt.callbacks.console import print_table
from meshbolt.callbacks.describe import describe_ranks, describe_strategy
from meshbolt.monitoring.memory import peak_before_resets
from meshbolt.plugins import Onlooker
from meshbolt.units import format_bytes, format_seconds

KEPT_STAMPS = 2048


class ClosingTable(Onlooker):
    """Print a table at the end of `fit`: strategy, ranks, step time, tokens per second, memory of each rank.

    A step is one of the optimizer, with all batches of its window and the loading of data, without validation. Memory
    is the peak of the process on a CPU (its resident set), and the peak that tensors took on a GPU.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import ClosingTable
        >>> trainer = Trainer(strategy="zero2", accelerator="cpu", devices=2, callbacks=[ClosingTable()])
    """

    def __init__(self) -> None:
        """Measure nothing yet."""
        self._laps: Laps | None = None
        self._num_windows = 0
        self._amount: Amount | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._laps = Laps(trainer.strategy.root_device)
        self._num_windows, self._amount = 0, None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time where a window begins."""
        if self._laps is not None and batch_idx % trainer.accumulate_grad_batches == 0:
            self._laps.stamp()
            self._num_windows += 1
        amount = amount_in(batch)
        if amount is not None:
            before = self._amount.count if self._amount is not None else 0
            self._amount = Amount(before + amount.count, amount.unit)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the time of validation out."""
        if self._laps is not None:
            self._laps.stamp()
            self._laps.pause()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        if self._laps is not None:
            self._laps.stamp()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect the memory of all ranks and print on rank 0."""
        memory = _of_all_ranks(trainer, peak_memory_bytes(trainer.strategy.root_device))
        if trainer.is_global_zero:
            print_table("this run", columns=("", ""), rows=self._rows(trainer, memory))
        self._laps = None

    def _rows(self, trainer: pl.Trainer, memory: list[float]) -> list[tuple[str, str]]:
        laps = self._laps.seconds() if self._laps is not None else []
        step_seconds = statistics.median(laps) if laps else None
        where = "GPU" if trainer.strategy.root_device.type == "cuda" else "process"
        lowest, mean, highest = (format_bytes(f(memory)) for f in (min, statistics.fmean, max))
        return [
            ("strategy", describe_strategy(trainer)),
            ("ranks", describe_ranks(trainer)),
            ("precision", str(trainer.precision)),
            ("steps", f"{trainer.global_step:,}"),
            ("step time, median", format_seconds(step_seconds) if step_seconds else "no step was taken"),
            *self._rate(trainer, step_seconds),
            (f"peak memory of a rank ({where})", f"{lowest} least, {mean} mean, {highest} most"),
        ]

    def _rate(self, trainer: pl.Trainer, step_seconds: float | None) -> list[tuple[str, str]]:
        if not step_seconds or self._amount is None:
            return []
        in_step = self._amount.count / self._num_windows * data_parallel_size(trainer)
        return [(f"{self._amount.unit}/s, all ranks", f"{in_step / step_seconds:,.0f}")]


class Laps:
    """Times between stamps on the clock of a device, read only at the end, so that a GPU is never waited for."""

    def __init__(self, device: torch.device) -> None:
        """Prepare to stamp.

        Args:
            device: "cuda" stamps events into its stream; any other takes the time of the host.
        """
        self._on_gpu = device.type == "cuda"
        self._stamps: deque[Any] = deque(maxlen=KEPT_STAMPS)

    def stamp(self) -> None:
        """Take the time; the oldest are forgotten beyond 2,048."""
        if not self._on_gpu:
            self._stamps.append(perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._stamps.append(event)

    def pause(self) -> None:
        """Count no lap between the stamp before and the one after."""
        self._stamps.append(None)

    def seconds(self) -> list[float]:
        """Return the time of every lap, in the order they were run."""
        if self._on_gpu:
            torch.cuda.synchronize()
        pairs = itertools.pairwise(self._stamps)
        return [self._between(start, end) for start, end in pairs if start is not None and end is not None]

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3 if self._on_gpu else float(end - start)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this rank has held: of tensors on a GPU, of the whole process on a CPU.

    Args:
        device: this rank's.
    """
    return max(_peak_memory_bytes(device), peak_before_resets(device))


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: there a process starts with the peak of the one that started it.
        peak_kib = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]
        return int(peak_kib) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _of_all_ranks(trainer: pl.Trainer, value: float) -> list[float]:
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(values, value)
    return values
