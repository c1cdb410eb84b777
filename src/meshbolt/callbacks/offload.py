"""What offloading moves in a run, how fast, and how much of its time other work hides."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from meshbolt.callbacks.monitoring import Monitor
from meshbolt.engine import Engine
from meshbolt.errors import ConfigError
from meshbolt.monitoring import Value
from meshbolt.monitoring.trace import TraceSpan, write_trace
from meshbolt.offload.traffic import Moved, OffloadTraffic
from meshbolt.units import format_bytes, format_seconds

_LANES = (
    "step",
    "step: waits",
    "updates",
    "updates: waits",
    "to the host",
    "to the device",
    "file: read",
    "file: write",
    "gathers: wait",
    "file: read parameters",
)
_SECONDS = ("busy", "not_hidden", "step_wait", "forward_wait", "other_wait", "read_wait", "room_wait", "gather_wait")
_WAYS = {
    "state_to_host": "copied to the host",
    "state_to_device": "copied to the device",
    "state_read": "read from files",
    "state_written": "written to files",
    "parameters_to_host": "of parameters copied to the host",
    "parameters_to_device": "of parameters copied to the device",
    "parameters_read": "of parameters read from files",
    "parameters_written": "of parameters written to files",
}


class OffloadMonitor(Monitor):
    """Log what offloading moves in a step, how fast, and how much of its time nothing hides.

    Each rank's numbers go to its records, and rank 0's to the loggers; a line at the end of the run sums them up. Names are in
    the catalogue of metrics, under `offload/`. A GPU is waited for only where a trace begins and ends.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import OffloadMonitor
        >>> monitor = OffloadMonitor(every=10, trace_steps=(3, 4))
        >>> trainer = Trainer(strategy="zero2_offload", accelerator="cpu", devices=2, callbacks=[monitor])
    """

    kind = "offload"

    def __init__(
        self,
        *,
        every: int = 10,
        directory: str | Path | None = None,
        trace_steps: tuple[int, int] | int | None = None,
    ) -> None:
        """Take the settings.

        Args:
            every: steps between two logs; see `Monitor`.
            directory: of the records; None: "meshbolt_records" in the run's directory.
            trace_steps: the first and the last step of the optimizer, counted from 0, that are drawn, with the forward pass
                after them: what runs when, for https://ui.perfetto.dev or chrome://tracing, in
                `offload_trace_rank_<rank>.json` beside the records. One number: one step. None: no trace.

        Raises:
            ConfigError: a setting is no number of steps.
        """
        super().__init__(every=every, directory=directory)
        self._trace_steps = _both_ends(trace_steps)
        self._trace: _Trace | None = None
        self._start = self._before = OffloadTraffic()
        self._steps_at_start = self._steps_before = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count.

        Raises:
            ConfigError: nothing is offloaded.
        """
        super().on_train_start(trainer, pl_module)
        engine = getattr(trainer.strategy, "engine", None)
        if engine is None or not engine.plan.settings.offload.is_used:
            raise ConfigError(
                "OffloadMonitor measures what is offloaded, and nothing is. Use MeshStrategy(offload='cpu'), or leave the "
                "callback out."
            )
        self._start = self._before = engine.offload_traffic()
        self._steps_at_start = self._steps_before = self.steps_taken

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a trace, where the step has come."""
        first = None if self._trace_steps is None else self._trace_steps[0]
        if self._trace is None and first is not None and trainer.global_step >= first:
            self._trace = _Trace(_engine_of(trainer))
        self._mark("forward")

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Note that the forward pass is over."""
        if self._trace is not None and self._trace_steps is not None and trainer.global_step > self._trace_steps[1]:
            self._trace.cut(trainer.global_step)
        self._mark("backward")

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the backward pass is over."""
        self._mark(None)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note that the step of the optimizer begins."""
        self._mark("optimizer step")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was moved since the last log, where a step was taken and it is time to."""
        self._mark(None)
        self._end_trace(trainer)
        if self.ends_step(trainer) and self.is_due(self.steps_taken):
            now, steps = _engine_of(trainer).offload_traffic(), self.steps_taken - self._steps_before
            self.report(trainer, _values(now - self._before, steps), steps=steps)
            self._before, self._steps_before = now, self.steps_taken

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say in a line what the run has moved."""
        engine, steps = _engine_of(trainer), self.steps_taken - self._steps_at_start
        engine.settle()  # what is under way counts
        if self._trace is not None:
            self._write_trace(trainer)
        if steps > 0:
            rank_zero_info(summary(engine.offload_traffic() - self._start, steps))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        super().on_exception(trainer, pl_module, exception)
        if self._trace is not None:
            self._trace.close()
        self._trace = None

    def _mark(self, phase: str | None) -> None:
        if self._trace is not None:
            self._trace.mark(phase)

    def _end_trace(self, trainer: pl.Trainer) -> None:
        """Write the trace one step late: what its last step leaves under way is heard of in the one after it."""
        if self._trace is not None and self._trace.is_over(trainer.global_step):
            self._write_trace(trainer)

    def _write_trace(self, trainer: pl.Trainer) -> None:
        trace, self._trace, self._trace_steps = self._trace, None, None
        if trace is not None and self.records is not None:
            path = self.records.directory / f"offload_trace_rank_{trainer.global_rank}.json"
            write_trace(path, trace.close(), rank=trainer.global_rank, lanes=_LANES)


def summary(moved: OffloadTraffic, steps: int) -> str:
    """Return in a line what a run has moved, how fast, and how much of it was hidden.

    Args:
        moved: in the run, by one rank.
        steps: of the optimizer.
    """
    parts = [_part(way, _WAYS[name]) for name, way in moved.moved() if way.num_bytes]
    parts.append(_part(moved.updated, "of state updated"))
    text = f"offload: in {steps} step{'s' if steps > 1 else ''} {', '.join(parts)}"
    if moved.hidden_fraction is None:
        return text
    hidden = f"{moved.hidden_fraction:.0%} of {format_seconds(moved.busy_seconds)} of updates was hidden"
    return f"{text}; {hidden}, {format_seconds(moved.not_hidden_seconds)} were waited for{_gathers(moved)}"


def _gathers(moved: OffloadTraffic) -> str:
    waited = moved.gather_wait_seconds
    return f", and {format_seconds(waited)} for parameters to be read" if waited else ""


def _part(way: Moved, what: str) -> str:
    speed = way.bytes_per_second
    return f"{format_bytes(way.num_bytes)} {what}" + (f" at {format_bytes(round(speed))}/s" if speed else "")


def _values(moved: OffloadTraffic, steps: int) -> Mapping[str, Value]:
    values: dict[str, Value] = {}
    for name, way in [*moved.moved(), ("updated", moved.updated)]:
        if way.num_bytes or way.done_bytes:
            values[f"offload/{name}_bytes"] = way.num_bytes / steps
            values[f"offload/{name}_bytes_per_second"] = way.bytes_per_second
    for name in _SECONDS:
        values[f"offload/{name}_seconds"] = getattr(moved, f"{name}_seconds") / steps
    values["offload/hidden_fraction"] = moved.hidden_fraction
    return values


def _engine_of(trainer: pl.Trainer) -> Engine:
    return trainer.strategy.engine  # type: ignore[attr-defined, no-any-return]


def _both_ends(steps: Any) -> tuple[int, int] | None:
    if steps is None:
        return None
    ends = (steps, steps) if isinstance(steps, int) else steps
    is_pair = isinstance(ends, (tuple, list)) and len(ends) == 2
    if (
        not is_pair
        or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        or isinstance(steps, bool)
    ):
        raise ConfigError(
            f"OffloadMonitor(trace_steps={steps!r}) is not a step, or the first and the last one of some."
        )
    if not 0 <= ends[0] <= ends[1]:
        raise ConfigError(
            f"OffloadMonitor(trace_steps={steps!r}) is no range of steps. Use 0 or more, the first one first."
        )
    return ends[0], ends[1]


class _Trace:
    """Watches what offloading does, and what the loop does meanwhile.

    Args:
        engine: whose.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._device = engine, engine.device
        self._spans: list[TraceSpan] = []
        self._lock = threading.Lock()
        self._phases: list[tuple[str, Any, Any]] = []
        self._phase: tuple[str, Any] | None = None
        self._anchor, self._zero = self._moment(), 0.0
        if engine.device.type == "cuda":
            self._anchor.synchronize()
        self._zero = perf_counter()
        self._cut: tuple[int, Any] | None = None
        engine.observe_offload(self._add)

    def mark(self, phase: str | None) -> None:
        """End what the loop did so far, and begin something else."""
        now = self._moment()
        if self._phase is not None:
            self._phases.append((*self._phase, now))
        self._phase = None if phase is None else (phase, now)

    def cut(self, step: int) -> None:
        """Leave out what begins from now on, if that has not been said before.

        Args:
            step: of the optimizer.
        """
        if self._cut is None:
            self._cut = step, self._moment()

    def is_over(self, step: int) -> bool:
        """Return whether a step has been taken since."""
        return self._cut is not None and step > self._cut[0]

    def close(self) -> list[TraceSpan]:
        """Stop watching; return what was seen."""
        self._engine.observe_offload(None)
        now = self._moment()
        if self._device.type == "cuda":
            now.synchronize()
        end = self._seconds(now if self._cut is None else self._cut[1])
        with self._lock:
            spans = list(self._spans)
        for phase, begun, ended in self._phases:
            spans.append(TraceSpan("step", phase, self._seconds(begun), self._seconds(ended)))
        return [span for span in spans if self._zero <= span.end_seconds and span.start_seconds < end]

    def _add(self, lane: str, name: str, start: float, end: float) -> None:
        with self._lock:
            self._spans.append(TraceSpan(lane, name, start, end))

    def _moment(self) -> Any:
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, moment: Any) -> float:
        return self._zero + self._anchor.elapsed_time(moment) / 1e3 if self._device.type == "cuda" else float(moment)
