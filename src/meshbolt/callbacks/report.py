"""A report of a run as one HTML file, written when it ends, however it ends."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from meshbolt.callbacks.describe import describe_strategy
from meshbolt.callbacks.monitoring import Monitor
from meshbolt.callbacks.origins import settings_of
from meshbolt.callbacks.pipeline_timeline import MeasuredBatch, PipelineTimeline
from meshbolt.callbacks.surroundings import machine_of, restarts, surroundings
from meshbolt.callbacks.warned import Warned
from meshbolt.collectives import agree_on_error
from meshbolt.config import Plan
from meshbolt.errors import ConfigError, MeshboltError
from meshbolt.monitoring.report import find_runs, write_report
from meshbolt.pipeline import Timeline

_log = logging.getLogger(__name__)


class RunReport(Monitor):
    """Write a report of a fit: curves of what is logged, where time and memory went, events, settings, environment.

    It is one HTML file, for any browser, that asks for nothing over a network. What other monitors of the same Trainer record is
    in it; this one records what the module logs, and what happens. `meshbolt report DIRECTORY` writes the same from the records
    alone, also of a run that was killed.

    Attributes:
        path: of the file; None until a run has begun, where it was not given.
        origins: where settings are from, by their names; the command line fills it in.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import RunReport, ThroughputMonitor
        >>> trainer = Trainer(strategy="zero2", accelerator="cpu", devices=2, callbacks=[RunReport(), ThroughputMonitor()])
    """

    kind = "metrics"

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        every: int = 1,
        directory: str | Path | None = None,
        pipeline_step: int | None = 3,
    ) -> None:
        """Take the settings.

        Args:
            path: of the file; None: "report.html" beside the directory of records.
            every: steps between two records of what the module logs; see `Monitor`.
            directory: of the records; None: "meshbolt_records" in the run's directory.
            pipeline_step: the step of the optimizer, counted from 0, whose first batch is measured if there is a pipeline, as
                `PipelineTimeline` does; None: none is.

        Raises:
            ConfigError: a number is none of steps.
        """
        super().__init__(every=every, directory=directory)
        is_step = isinstance(pipeline_step, int) and not isinstance(pipeline_step, bool) and pipeline_step >= 0
        if pipeline_step is not None and not is_step:
            raise ConfigError(
                f"RunReport(pipeline_step={pipeline_step!r}) is not the number of a step. Use 0 or more, or None."
            )
        self.path = None if path is None else Path(path)
        self.origins: Mapping[str, str] = {}
        self._asked_path, self._pipeline_step = self.path, pipeline_step
        self._measuring: MeasuredBatch | None = None
        self._seen: dict[str, Any] = {}
        self._validated: dict[str, torch.Tensor] = {}
        self._steps_of: dict[str, int] = {}
        self._waiting: _Waiting | None = None
        self._warned: Warned | None = None
        self._is_open = False

    # A fit begins and ends ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the records, on all ranks or on none.

        Raises:
            ConfigError: there are two callbacks of this class, or records or the report cannot be written.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self.records is None:
            return
        self.path = self._asked_path or self.records.directory.parent / "report.html"
        self._seen, self._validated, self._steps_of = {}, {}, {}
        self._waiting, self._measuring = None, None
        path = self.path

        def try_to_write() -> None:
            if trainer.is_global_zero:
                _check_writable(path)

        agree_on_error(try_to_write) if dist.is_initialized() else try_to_write()
        if trainer.is_global_zero:
            self._warned = Warned(lambda text: self._tell(trainer, "warning", text))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record what begins."""
        super().on_train_start(trainer, pl_module)
        self._begin(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record how it ended, and write the report on rank 0 when all ranks have written their records."""
        trainer.strategy.barrier("meshbolt report")
        self._end(trainer, "finished", _reason(trainer))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Record what ended it, and write the report with what there is."""
        super().on_exception(trainer, pl_module, exception)
        if self.records is None or trainer.state.fn != "fit":
            return
        text = f"{type(exception).__name__}: {exception}"
        if not trainer.is_global_zero:
            self._tell(trainer, "failed", text)
            return
        self._begin(trainer, pl_module)
        is_asked_for = isinstance(exception, (KeyboardInterrupt, SystemExit, SIGTERMException))
        trace = "".join(traceback.format_exception(type(exception), exception, exception.__traceback__))
        self._end(trainer, "interrupted" if is_asked_for else "failed", text, traceback=trace[-20_000:])

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hear no more warnings, and let go of the records."""
        self._stop_listening()
        self._is_open = False
        super().teardown(trainer, pl_module, stage)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_open or self.records is None:
            return
        self._is_open = True
        step = trainer.global_step
        if trainer.is_global_zero:
            self.records.write("run", step=step, values={"what": "start"}, **self._start(trainer, pl_module))
        self.records.write("rank", step=step, values=machine_of(trainer))

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        plan = getattr(trainer.strategy, "plan", None)
        own = isinstance(plan, Plan)
        return {
            "title": type(pl_module).__name__,
            "strategy": describe_strategy(trainer),
            "call": repr(trainer.strategy).rpartition(" for ")[0] if own else None,
            "world_size": trainer.world_size,
            "device": trainer.strategy.root_device.type,
            "precision": str(trainer.precision),
            "mesh": plan.mesh.sizes() if isinstance(plan, Plan) else {},
            "offloads": plan.settings.offload.is_used if isinstance(plan, Plan) else False,
            "max_steps": trainer.max_steps,
            "restarts": restarts(),
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "settings": settings_of(trainer, self.origins),
            "environment": surroundings(),
        }

    def _end(self, trainer: pl.Trainer, status: str, text: str, **further: Any) -> None:
        if self.records is None or not self._is_open:
            return
        self._is_open = False
        self._write_waiting()
        self._stop_listening()
        if trainer.is_global_zero:
            values = {"what": "end", "status": status, "text": text}
            self.records.write("run", step=trainer.global_step, values=values, **further)
            self._write_report(self.records.directory)

    def _write_report(self, directory: Path) -> None:
        try:
            write_report(find_runs(directory)[-1], self.path or directory.parent / "report.html")
        except (MeshboltError, OSError) as error:
            # A run that is over is not to fail for its report; the records are there.
            _log.warning("The report was not written: %s Try `meshbolt report %s`.", error, directory)
            return
        rank_zero_info(f"report: {self.path}")

    def _stop_listening(self) -> None:
        if self._warned is not None:
            self._warned.close()
        self._warned = None

    # What happens -------------------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record that a checkpoint is saved."""
        if trainer.is_global_zero:
            self._tell(trainer, "checkpoint", f"a checkpoint of step {trainer.global_step:,} is saved")

    def _tell(self, trainer: pl.Trainer, what: str, text: str) -> None:
        if self.records is not None:
            self.records.write("event", step=trainer.global_step, values={"what": what, "text": text})

    # What is logged -----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure a batch of a pipeline, where its step has come."""
        is_due = self._pipeline_step is not None and trainer.global_step >= self._pipeline_step
        if not is_due or getattr(trainer.strategy, "pipeline", None) is None:
            return
        self._pipeline_step = None
        if not any(isinstance(each, PipelineTimeline) for each in trainer.callbacks):  # type: ignore[attr-defined]
            self._measuring = MeasuredBatch(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record what was logged, where it is time to."""
        self._record_pipeline(trainer)
        # Not after each batch of a window: the last one speaks for it.
        if self.ends_step(trainer) and trainer.is_global_zero and self.is_due(self.steps_taken):
            self._record_metrics(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record what validation found."""
        # Every rank has computed the means over the epoch by now, so that reading them starts no collective.
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = self._record_metrics(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the last values: means over an epoch come after its last batch."""
        self._record_drawn_pipeline(trainer)
        if trainer.is_global_zero:
            self._record_metrics(trainer)

    def _record_metrics(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        """Take what was logged since the last time, and return it; on a GPU it is written the next time, when it has arrived."""
        metrics = trainer.callback_metrics
        fresh = {
            name: value
            for name, value in metrics.items()
            if isinstance(value, torch.Tensor)
            and f"{name}_step" not in metrics
            and not self._is_known(name, value, trainer.global_step)
        }
        self._seen, self._validated = dict(metrics), {}
        self._steps_of.update(dict.fromkeys(fresh, trainer.global_step))
        self._write_waiting()
        self._waiting = _Waiting(trainer.global_step, fresh) if fresh else None
        if self._waiting is not None and self._waiting.is_there:
            self._write_waiting()
        return fresh

    def _is_known(self, name: str, value: torch.Tensor, step: int) -> bool:
        """Return whether a value was recorded before; what validation found comes once more, as other tensors."""
        if value is self._seen.get(name) or self._steps_of.get(name) == step:
            return True
        known = self._validated.get(name)
        return known is not None and torch.equal(value, known)

    def _write_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and self.records is not None:
            self.records.write(self.kind, step=waiting.step, values=waiting.numbers())

    def _record_pipeline(self, trainer: pl.Trainer) -> None:
        if self._measuring is None:
            return
        timelines, self._measuring = self._measuring.end(), None
        if trainer.is_global_zero:
            self._write_timelines(trainer.global_step - 1, timelines)

    def _record_drawn_pipeline(self, trainer: pl.Trainer) -> None:
        """Record what another callback has measured, so that it is measured once."""
        for each in trainer.callbacks if trainer.is_global_zero else ():  # type: ignore[attr-defined]
            if isinstance(each, PipelineTimeline) and each.timelines:
                self._write_timelines(each.step, each.timelines)

    def _write_timelines(self, step: int, timelines: Mapping[str, Timeline]) -> None:
        measured = timelines["measured"]
        if self.records is not None:
            self.records.write(
                "pipeline",
                step=max(step, 0),
                values={},
                schedule=measured.schedule,
                stages=measured.stages,
                microbatches=measured.microbatches,
                timelines=[_drawn(name, each) for name, each in timelines.items()],
            )


class _Waiting:
    """Numbers on their way from the device; nobody waits for them before they are read.

    Args:
        step: of the optimizer.
        metrics: tensors with one number each.
    """

    def __init__(self, step: int, metrics: Mapping[str, torch.Tensor]) -> None:
        self.step = step
        self._metrics, self._event = metrics, None
        device = next((value.device for value in metrics.values() if value.device.type == "cuda"), None)
        if device is not None:
            self._event = torch.cuda.Event()
            with torch.no_grad():
                # One copy for all of them, in the order of the stream.
                flat = [
                    value.detach().reshape(()).to(device, torch.float64, non_blocking=True)
                    for value in metrics.values()
                ]
                self._copied = torch.stack(flat).to("cpu", non_blocking=True)
            self._event.record()

    @property
    def is_there(self) -> bool:
        """Whether the numbers can be read without waiting."""
        return self._event is None or bool(self._event.query())

    def numbers(self) -> dict[str, float]:
        """Return the numbers by their names."""
        if self._event is None:
            return {name: float(value.item()) for name, value in self._metrics.items()}
        self._event.synchronize()
        return dict(zip(self._metrics, self._copied.tolist(), strict=True))


def _drawn(name: str, timeline: Timeline) -> dict[str, Any]:
    spans = [
        [each.rank, each.stage, each.microbatch, each.work, round(each.start, 7), round(each.end, 7)]
        for each in timeline.spans
    ]
    title = {"planned": "by its schedule"}.get(name, name)
    return {"name": title, "end_seconds": timeline.end, "bubble": timeline.bubble, "spans": spans}


def _reason(trainer: pl.Trainer) -> str:
    if 0 < trainer.max_steps <= trainer.global_step:
        return f"max_steps={trainer.max_steps} was reached"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"max_epochs={trainer.max_epochs} was reached"
    return "it was told to stop" if trainer.should_stop else ""


def _check_writable(path: Path) -> None:
    """Try before training what is to be done after it.

    Raises:
        ConfigError: the report could not be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a directory")
        with path.open("ab"):
            pass
        if not path.stat().st_size:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"The report cannot be written to {path}: {error.strerror}. Give another path: RunReport(path='...')."
        ) from error
