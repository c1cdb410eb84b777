"""How fast a run goes, how near to what its devices could do, and where the time of its steps goes."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from meshbolt.callbacks.amount import amount_in, data_parallel_size, samples_in
from meshbolt.callbacks.clock import StepClock, StepTimes
from meshbolt.callbacks.fetching import FetchTimer
from meshbolt.callbacks.look import FlopsOfBatches, Look
from meshbolt.callbacks.moment import Moment
from meshbolt.callbacks.monitoring import Monitor
from meshbolt.callbacks.summing import Part
from meshbolt.compat import waits_observed
from meshbolt.config import Plan
from meshbolt.errors import ConfigError
from meshbolt.monitoring import Value
from meshbolt.monitoring.peaks import Peak, find_peak
from meshbolt.monitoring.throughput import SUMMED, StepFigures, of_rank, of_run, percentiles

# The first step allocates and compiles, and is in no number.
_FIRST_COUNTED, _FIRST_LOGGED = 2, 3
_DTYPES = {"64": "float64", "32": "float32", "bf16": "bfloat16", "16": "float16"}


class ThroughputMonitor(Monitor):
    """Log samples, tokens and floating-point operations per second, MFU, HFU, and what the time of a step is spent on.

    Numbers are of the whole run, and right for every plan: ranks that share a batch count it once, a step is all batches of
    its window, and validation is not in it. The first log comes after the third step. On a GPU nothing is waited for: times are
    events of its stream, read a step later. `docs/metrics.md` lists every name, unit and formula.

    Floating-point operations are counted on the user's own step: once for each form of batch, it is run on tensors without
    values, forwards and backwards, as if one process ran it whole. From the 17th form on, one with nearly as many elements as
    a known one (3 %) counts in proportion to that.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import ThroughputMonitor
        >>> trainer = Trainer(callbacks=[ThroughputMonitor(every=20)])
    """

    kind = "throughput"

    def __init__(
        self,
        *,
        every: int = 10,
        window: int = 100,
        peak_flops: float | None = None,
        tokens: Callable[[Any], int] | None = None,
        flops: Callable[[Any], float] | None = None,
        directory: str | Path | None = None,
    ) -> None:
        """Take the settings.

        Args:
            every: steps between two logs; see `Monitor`.
            window: steps of which percentiles are.
            peak_flops: floating-point operations per second that a device can do in the dtype of the run; None: known for usual
                GPUs, and without it there is no MFU for others.
            tokens: returns the number of tokens of a batch on a rank, from its shapes; None: whole numbers in two dimensions,
                (samples, length), are tokens, with padding.
            flops: returns the floating-point operations of a batch, forwards and backwards; None: they are counted.
            directory: of the records; see `Monitor`.

        Raises:
            ConfigError: a number is none of that kind.
        """
        super().__init__(every=every, directory=directory)
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ConfigError(f"ThroughputMonitor(window={window!r}) is not a number of steps. Use 1 or more.")
        if peak_flops is not None and not peak_flops > 0:
            raise ConfigError(
                f"ThroughputMonitor(peak_flops={peak_flops!r}) is not what a device can compute. Give floating-point operations "
                "per second, such as 989e12."
            )
        self.window, self.peak_flops, self.tokens, self.flops = window, peak_flops, tokens, flops
        self.latest: dict[str, Value] = {}
        self._look: Look | None = None
        self._run: _Run | None = None
        self._watching = ExitStack()

    # A run begins and ends ------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the records, where it is about to train."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    @override
    def before_sharding(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the module as it is whole."""
        plan = getattr(trainer.strategy, "plan", None)
        self._look = Look(pl_module, plan if isinstance(plan, Plan) else None)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure."""
        super().on_train_start(trainer, pl_module)
        self.latest = {}
        device = trainer.strategy.root_device
        peak = self._peak(trainer)
        if peak is None:
            _ask_for_peak(device)
        if not self._look or not self._look.is_of(pl_module):
            # Other strategies do not say when a module is whole; it is with these.
            is_whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
            self._look = Look(pl_module, None) if is_whole else None
        counted = FlopsOfBatches(self._look, given=self.flops)
        self._run = run = _Run(trainer, peak=peak, window=self.window, counted=counted)
        run.part = self.take_part(SUMMED, functools.partial(self._tell, trainer, run))
        self._watching.enter_context(run.fetching.listening(trainer.profiler))  # type: ignore[attr-defined]
        self._watching.enter_context(waits_observed(device, run.clock.waiting, run.clock.waited))
        run.clock.begin("between")
        self._watch_next(run)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was measured since the last log, and stop."""
        run, self._run = self._run, None
        if run is None:
            return
        self._watching.close()
        if run.moment is not None:
            run.part.want(run.moment, functools.partial(run.numbers, run.taken, wait=True))
        run.part.leave()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop."""
        super().on_exception(trainer, pl_module, exception)
        self._watching.close()
        self._run = None

    # A step ---------------------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what the batch holds, and that its forward begins."""
        if self._run is None:
            return
        run = self._run
        run.counted.count(trainer, batch, batch_idx, around=run.clock)
        run.count(batch, tokens=self._tokens_of(batch))
        run.clock.begin("forward")

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Note that the backward begins."""
        self._begin("backward")

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the backward has ended."""
        self._begin("after")

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Note that the optimizer begins."""
        self._begin("optimizer")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step, where the batch was its last, and log what is there of earlier ones."""
        run = self._run
        if run is None:
            return
        if not self.ends_step(trainer):
            run.clock.begin("between")
            return
        run.end_step(self.moment)
        run.part.go_on(self.steps_taken)
        is_due = run.taken == _FIRST_LOGGED or self.is_due(self.steps_taken)
        if is_due and run.moment is not None:
            run.part.want(run.moment, functools.partial(run.numbers, run.taken))
        self._watch_next(run)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave validation out."""
        if self._run is not None:
            self._run.clock.pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on."""
        self._begin("between")

    def _begin(self, phase: Any) -> None:
        if self._run is not None:
            self._run.clock.begin(phase)

    def _watch_next(self, run: _Run) -> None:
        """Watch the waits of the next step: of each on a CPU; on a GPU, where that takes events, of those before a log."""
        if not run.on_gpu or self.is_due(self.steps_taken + 1) or run.taken + 1 == _FIRST_LOGGED:
            run.clock.watch()

    def _tell(self, trainer: pl.Trainer, run: _Run, moment: Moment, sums: Mapping[str, float]) -> None:
        """Log sums that are there."""
        values = of_run(sums, ranks=run.part.ranks, tells_passes_apart=run.tells_passes_apart)
        source = {"throughput/peak_source": None if run.peak is None else run.peak.source}
        asked = run.asked
        self.latest = {**values, **asked.percentiles, **source}
        self.report(trainer, self.latest, moment=moment, own=asked.own, steps=asked.steps)

    # What is not measured -------------------------------------------------------------------------------------------------

    def _tokens_of(self, batch: Any) -> int | None:
        if self.tokens is None:
            amount = amount_in(batch)
            return amount.count if amount is not None and amount.unit == "tokens" else None
        count = self.tokens(batch)
        if isinstance(count, torch.Tensor) and count.device.type != "cpu":
            raise ConfigError(
                f"ThroughputMonitor(tokens=...) returned a tensor on {count.device}, for which every step would have to wait. "
                "Return a number that is known from shapes, or count in the loader."
            )
        return int(count)

    def _peak(self, trainer: pl.Trainer) -> Peak | None:
        if self.peak_flops is not None:
            return Peak(float(self.peak_flops), "peak_flops= of ThroughputMonitor")
        device, dtype = trainer.strategy.root_device, _DTYPES.get(str(trainer.precision).partition("-")[0])
        if device.type != "cuda" or dtype is None:
            return None
        name = torch.cuda.get_device_name(device)
        if dtype == "float32" and _multiplies_in_19_bits() and (peak := find_peak(name, "tfloat32")) is not None:
            return peak
        return find_peak(name, dtype)


@dataclass(frozen=True)
class _Asked:
    """What is of this rank, of the numbers for which sums were asked."""

    steps: int
    own: dict[str, float]
    percentiles: dict[str, Value]


class _Run:
    """What is measured of a run so far."""

    part: Part
    asked: _Asked

    def __init__(self, trainer: pl.Trainer, *, peak: Peak | None, window: int, counted: FlopsOfBatches) -> None:
        strategy = trainer.strategy
        self.clock = StepClock(strategy.root_device)
        self.fetching = FetchTimer(begins=self._begin_fetch, ends=self._end_fetch, updated=self._end_update)
        self.peak, self.counted = peak, counted
        self.tells_passes_apart = getattr(strategy, "pipeline", None) is None
        self.taken = 0
        self.moment: Moment | None = None
        """The last step's, from the first one on that counts."""
        self.on_gpu = strategy.root_device.type == "cuda"
        self._sharing = max(1, trainer.world_size // data_parallel_size(trainer))
        self._traffic = _traffic_of(strategy)
        self._before = self._traffic() if self._traffic is not None else None
        self._steps: list[StepFigures] = []
        self._window = deque[float](maxlen=window)
        self._samples: int | None = 0
        self._tokens: int | None = 0

    def count(self, batch: Any, *, tokens: int | None) -> None:
        """Add a batch to the step."""
        self._samples, self._tokens = _added(self._samples, samples_in(batch)), _added(self._tokens, tokens)

    def end_step(self, moment: Moment) -> None:
        """End a step, and read those that are there."""
        self._read()
        self.taken += 1
        self.moment = moment if self.taken >= _FIRST_COUNTED else None
        after = self._traffic() if self._traffic is not None else None
        note = {
            "samples": self._samples,
            "tokens": self._tokens,
            "flops": self.counted.take(),
            "offload": None if after is None else after - self._before,
        }
        self._samples = self._tokens = 0
        self._before = after
        self.clock.end_step(self.taken, note)

    def numbers(self, last: int, *, wait: bool = False) -> dict[str, float]:
        """Return what this rank adds to the sums, of steps that were not logged; nothing, where it has read none.

        Args:
            last: the number of the last step.
            wait: for what is still under way, at the end of a run.
        """
        self._read(last=last, wait=wait)
        own = of_rank(self._steps, sharing=self._sharing, peak_flops=self.peak.flops_per_second if self.peak else None)
        self.asked = _Asked(
            steps=len(self._steps),
            own={name: own[name] for name in own if name.endswith("_seconds")},
            percentiles=percentiles(self._window) if self._window else {},
        )
        self._steps.clear()
        return own

    def _read(self, *, last: int | None = None, wait: bool = False) -> None:
        for times in self.clock.read(last=last, wait=wait):
            self._keep(times)

    def _begin_fetch(self) -> None:
        if self.clock.phase != "pause":  # validation gets batches too
            self.clock.begin("fetch")

    def _end_fetch(self) -> None:
        if self.clock.phase == "fetch":
            self.clock.begin("between")

    def _end_update(self) -> None:
        # Under manual optimisation, what comes after it may be another forward pass.
        if self.clock.phase == "optimizer":
            self.clock.begin("forward")

    def _keep(self, times: StepTimes) -> None:
        if times.number < _FIRST_COUNTED:
            return
        phases, offload = times.phases, times.note["offload"]
        self._window.append(times.seconds)
        self._steps.append(
            StepFigures(
                seconds=times.seconds,
                fetch_seconds=phases.get("fetch", 0.0),
                forward_seconds=phases.get("forward", 0.0),
                backward_seconds=phases.get("backward", 0.0),
                optimizer_seconds=phases.get("optimizer", 0.0),
                exposed_seconds=times.exposed,
                offload_forward_seconds=0.0 if offload is None else offload.forward_wait_seconds,
                offload_step_seconds=0.0 if offload is None else offload.step_wait_seconds,
                samples=times.note["samples"],
                tokens=times.note["tokens"],
                flops=times.note["flops"],
            )
        )


def _added(so_far: int | None, more: int | None) -> int | None:
    return None if so_far is None or more is None else so_far + more


def _traffic_of(strategy: Any) -> Callable[[], Any] | None:
    """Return what says how long this rank has waited for offloading; None where nothing is offloaded."""
    plan = getattr(strategy, "plan", None)
    if not isinstance(plan, Plan) or not plan.settings.offload.is_used:
        return None
    traffic: Callable[[], Any] = strategy.engine.offload_traffic
    return traffic


def _multiplies_in_19_bits() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set in another of torch's ways
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _ask_for_peak(device: torch.device) -> None:
    if device.type == "cuda":
        rank_zero_warn(
            f"What a {torch.cuda.get_device_name(device)} can compute in this run's dtype is not known, and there is no MFU. "
            "Give its dense peak: ThroughputMonitor(peak_flops=...), in floating-point operations per second."
        )
    else:
        rank_zero_info(
            f"ThroughputMonitor shows no MFU, as the peak of this {device.type} is not known: give peak_flops=, in "
            "floating-point operations per second."
        )
