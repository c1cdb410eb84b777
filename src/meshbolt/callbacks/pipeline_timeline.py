"""When each stage of a pipeline computes which microbatch: one step of a run, drawn."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import override

from meshbolt.callbacks.console import write_line
from meshbolt.errors import ConfigError
from meshbolt.pipeline import Span, Timeline, draw, plan_timeline
from meshbolt.units import format_seconds


class PipelineTimeline(pl.Callback):
    """Measure a step of a pipeline, and draw it above the same step as its schedule has it.

    For one batch every rank takes the time at which each of its stages begins and ends with each microbatch; rank 0 writes the
    picture, of the pipeline it is in: ranks from top to bottom, time from left to right. "planned" is the schedule played through
    with the mean times of each stage, and nothing else: what it waits less than "measured" is spent on sending, gathering, and
    passes that take longer than others. The measured batch takes longer than others, as ranks begin it together.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import PipelineTimeline
        >>> timeline = PipelineTimeline("step.svg", step=20)
        >>> trainer = Trainer(strategy="pipeline_parallel", callbacks=[timeline], accelerator="cpu", devices=2)
    """

    def __init__(self, path: str | Path, *, step: int = 3) -> None:
        """Take the settings.

        Args:
            path: of the SVG file, written on rank 0.
            step: of the optimizer, counted from 0, whose first batch is measured; first ones take longer.

        Raises:
            ConfigError: the step is no number.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ConfigError(f"PipelineTimeline(step={step!r}) is not the number of a step. Use 0 or more.")
        self.path, self.step = Path(path), step
        self.timelines: Mapping[str, Timeline] = {}
        self._measuring: MeasuredBatch | None = None
        self._is_done = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the pipeline.

        Raises:
            ConfigError: there is none.
        """
        if getattr(trainer.strategy, "pipeline", None) is None:
            raise ConfigError(
                "PipelineTimeline measures the stages of a pipeline, and the strategy has none. Use "
                "MeshStrategy(pipeline_parallel=2), or leave the callback out."
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure, where the step has come."""
        if not self._is_done and self._measuring is None and trainer.global_step >= self.step:
            self._measuring = MeasuredBatch(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect what all ranks have measured, and draw it on rank 0."""
        if self._measuring is None:
            return
        found = self._measuring.end()
        self._measuring, self._is_done = None, True
        if trainer.is_global_zero:
            self.timelines = found
            self._write(found)

    def _write(self, found: Mapping[str, Timeline]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        named = {f"{name}, {format_seconds(each.end)}": each for name, each in found.items()}
        self.path.write_text(draw(named), encoding="utf-8")
        write_line(
            f"pipeline: in step {self.step} ranks waited {found['measured'].bubble:.1%} of the time, and by the schedule "
            f"{found['planned'].bubble:.1%}: {self.path}"
        )


class MeasuredBatch:
    """Takes the times of all passes of a batch, from where it is made to `end`.

    Args:
        trainer: about to run a batch through the stages of its strategy; ranks begin it together.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._steps: Any = trainer.strategy.pipeline  # type: ignore[attr-defined]
        self._setting = trainer.strategy.plan.settings.pipeline_parallel  # type: ignore[attr-defined]
        self._clock = _Clock(trainer.strategy.root_device)
        self._steps.observe_passes(self._clock.passing)
        self._clock.begin()

    def end(self) -> Mapping[str, Timeline]:
        """Return what all ranks of this pipeline have measured, and the same batch as its schedule has it."""
        self._steps.observe_passes(None)
        found: list[Any] = [None] * self._steps.group.size()
        dist.all_gather_object(found, self._clock.passes(), group=self._steps.group)
        measured = _measured(found, schedule=self._setting.schedule, stages=self._setting.stages)
        return {"measured": measured, "planned": _planned(measured)}


_Pass = tuple[str, int, int, float, float]


class _Clock:
    """Takes the times of passes, in seconds since all ranks have begun.

    Args:
        device: where they compute; a GPU is asked when it gets to a pass, and is not waited for in between.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._device = device.type == "cuda", device
        self._start: Any = None
        self._noted: list[tuple[str, int, int, Any, Any]] = []

    def begin(self) -> None:
        """Wait for all ranks."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        dist.barrier()
        self._start = self._now()

    @contextmanager
    def passing(self, work: str, stage: int, microbatch: int) -> Iterator[None]:
        """Take the time of a pass.

        Args:
            work: "F", "B", or its halves "I" and "W".
            stage: which one runs.
            microbatch: which one it runs.
        """
        begun = self._now()
        yield
        self._noted.append((work, stage, microbatch, begun, self._now()))

    def passes(self) -> list[_Pass]:
        """Return all passes, with when they began and ended."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        return [(*which, self._since(begun), self._since(ended)) for *which, begun, ended in self._noted]  # type: ignore[misc]

    def _now(self) -> Any:
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, moment: Any) -> float:
        return float(self._start.elapsed_time(moment)) / 1e3 if self._on_gpu else float(moment - self._start)


def _measured(found: list[list[_Pass]], *, schedule: str, stages: int) -> Timeline:
    begun = min(start for passes in found for *_, start, _ in passes)
    spans = [
        Span(rank=rank, stage=stage, microbatch=number, work=work, start=start - begun, end=end - begun)
        for rank, passes in enumerate(found)
        for work, stage, number, start, end in passes
    ]
    count = len({span.microbatch for span in spans})
    return Timeline(schedule=schedule, ranks=len(found), stages=stages, microbatches=count, spans=tuple(spans))


def _planned(measured: Timeline) -> Timeline:
    """Return the same step by its schedule, with the mean times of each stage."""
    times = defaultdict[tuple[str, int], list[float]](list)
    for span in measured.spans:
        times[span.work, span.stage].append(span.end - span.start)
    mean = {each: statistics.fmean(taken) for each, taken in times.items()}
    stages = range(measured.stages)
    apart = [sum(mean.get((work, stage), 0.0) for work in ("I", "W")) for stage in stages]
    return plan_timeline(
        measured.schedule,
        [mean["F", stage] for stage in stages],
        backward_costs=[mean.get(("B", stage), apart[stage]) for stage in stages],
        split_backward=[
            mean.get(("I", stage), 0.0) / apart[stage] if ("W", stage) in mean else 1.0 for stage in stages
        ],
        ranks=measured.ranks,
        microbatches=measured.microbatches,
    )
