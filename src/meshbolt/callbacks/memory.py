"""What a rank's memory holds in a step, by category, and what to do where there is too little of it."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer
from typing_extensions import override

from meshbolt.callbacks.amount import samples_in
from meshbolt.callbacks.memory_of_step import MemoryOfStep, Phase
from meshbolt.callbacks.moment import Moment
from meshbolt.callbacks.monitoring import Monitor
from meshbolt.callbacks.out_of_memory import Failure, asked_for, is_out_of_memory
from meshbolt.callbacks.summing import Part
from meshbolt.compat import dump_allocator
from meshbolt.config import Plan
from meshbolt.engine import Engine
from meshbolt.engine.compose import ROOT
from meshbolt.engine.memory import CATEGORIES, HeldMemory, Tier, held_memory, unit_bytes
from meshbolt.engine.savings import Load, savings, state_bytes
from meshbolt.errors import ConfigError
from meshbolt.monitoring import Value
from meshbolt.monitoring.memory import Usage, address_limit_bytes, process_bytes

_IN_WORDS: Mapping[Phase, str] = {
    "between": "what comes between two steps",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the step of the optimizer",
}
_ELSEWHERE = ("parameters", "gradients", "optimizer")


class MemoryMonitor(Monitor):
    """Log what each rank's memory holds, exact to the byte where meshbolt owns it, with the peak of a step and its phase.

    Parameters, gradients, state of optimizers, gathered parameters and buffers are what their storages take on the device, in
    host memory and in files; activations and the rest are what is in use beside them: what torch's allocator has on a GPU, the
    anonymous memory of the process on a CPU, for activations what is allocated there. Nothing is waited for. Peaks are reset in
    each step, so that `torch.cuda.max_memory_allocated` starts anew with them.

    A rank that runs out of memory says where it was, who holds what, and which settings would save how much; the error goes on.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import MemoryMonitor
        >>> trainer = Trainer(strategy="zero3", accelerator="cpu", devices=2, callbacks=[MemoryMonitor(every=20)])
    """

    kind = "memory"

    def __init__(self, *, every: int = 10, directory: str | Path | None = None) -> None:
        """Take the settings.

        Args:
            every: steps between two logs; see `Monitor`.
            directory: of the records, and of what `snapshot` writes; None: "meshbolt_records" in the run's directory.
        """
        super().__init__(every=every, directory=directory)
        self._run: _Run | None = None

    # A run begins and ends ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the records.

        Raises:
            ConfigError: the strategy is not meshbolt's, or see `Monitor`.
        """
        if stage == "fit" and not isinstance(getattr(trainer.strategy, "plan", None), Plan):
            raise ConfigError(
                f"MemoryMonitor knows what MeshStrategy holds, and the strategy is {type(trainer.strategy).__name__}. Use "
                "meshbolt's, such as Trainer(strategy='zero2'), or leave the callback out."
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure."""
        super().on_train_start(trainer, pl_module)
        self._run = run = _Run(trainer, trainer.strategy.engine)  # type: ignore[attr-defined]
        run.part = self.take_part(run.names, functools.partial(self._tell, trainer, run.ranks))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        run, self._run = self._run, None
        if run is not None:
            run.step.close()
            run.part.leave()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what to do, if there was too little memory."""
        super().on_exception(trainer, pl_module, exception)
        run, self._run = self._run, None
        if run is None:
            return
        if is_out_of_memory(exception):
            self._advise(trainer, run, exception)
        run.step.close()

    def _advise(self, trainer: pl.Trainer, run: _Run, exception: BaseException) -> None:
        """Say what to do, and write what is held; whatever goes wrong here, the exception is the error to be seen."""
        head = f"rank {trainer.global_rank} has run out of memory"
        try:
            _say(text := _failure(trainer, run, exception).text())
            if self.records is not None:
                first, *_ = text.splitlines()
                self.records.write("event", step=trainer.global_step, values={"what": "out_of_memory", "text": first})
                self._write_snapshot(trainer, run)
        except Exception as error:
            _say(f"{head}; not all could be told or written of what it holds: {error!r}")

    def snapshot(self) -> Path:
        """Write what this rank holds now, by module and category, to a file beside the records; return its path.

        On GPUs, what torch's allocators hold is written beside it, with the ending ".pickle", for https://pytorch.org/memory_viz.
        Call `torch.cuda.memory._record_memory_history()` early in the run to have it say who allocated it.

        Raises:
            ConfigError: no training is under way.
        """
        if self._run is None or self.records is None:
            raise ConfigError(
                "MemoryMonitor.snapshot() was called outside of training. Call it in a hook of a training step."
            )
        return self._write_snapshot(self._run.trainer, self._run)

    # A step -------------------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that a forward pass begins."""
        if (run := self._run) is not None:
            run.samples = samples_in(batch)
            run.closely = self._is_measured(run)
            run.enter("forward")
            # In a pipeline, backward passes are between the forward passes of one call.
            run.step.follow(run.held_in_step if run.closely else None)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Note what is held between forward and backward."""
        if (run := self._run) is not None:
            usage = run.enter("backward")
            if usage is not None and not run.engine.spans_stages:
                run.step.note_forward(usage, run.held_in_step())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note what gradients take."""
        if (run := self._run) is not None and run.enter("optimizer") is not None:
            run.at_step = run.held_in_step()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, where a step was taken and it is time to."""
        if (run := self._run) is None:
            return
        usage = run.enter("between")
        if not self.ends_step(trainer):
            return
        run.step.end_step(run.updates, closely=run.closely)
        run.updates, run.is_first = self.moment.step, False
        run.part.go_on(self.steps_taken)
        if usage is not None:
            held = run.held_before = run.held()
            run.step.note_rest(usage, held)
            if self.is_due(self.steps_taken):
                self._log(trainer, run, usage, held)

    def _is_measured(self, run: _Run) -> bool:
        """Return whether the step that is taken now is looked at closely: the first one, and those that are logged."""
        return run.is_first or self.is_due(self.steps_taken + 1)

    def _log(self, trainer: pl.Trainer, run: _Run, usage: Usage, held: HeldMemory) -> None:
        self.report(trainer, {**run.values(usage, held), **run.step.values()})
        own = dict(zip(_names(trainer.global_rank), (usage.used_bytes, run.step.peak.peak_bytes), strict=True))
        run.part.want(self.moment, lambda: {**dict.fromkeys(run.names, 0.0), **own})
        run.step.begin_interval()

    def _tell(self, trainer: pl.Trainer, ranks: range, moment: Moment, sums: Mapping[str, float]) -> None:
        """Log what all ranks hold."""
        values: dict[str, Value] = {}
        for place, name in enumerate(("used", "peak")):
            each = [sums[_names(rank)[place]] for rank in ranks]
            values[f"memory/{name}_least_bytes"] = round(min(each))
            values[f"memory/{name}_mean_bytes"] = sum(each) / len(each)
            values[f"memory/{name}_most_bytes"] = round(max(each))
        peaks = [sums[_names(rank)[1]] for rank in ranks]
        values["memory/peak_most_rank"] = peaks.index(max(peaks))
        if trainer.is_global_zero:
            self.report(trainer, values, moment=moment)

    def _write_snapshot(self, trainer: pl.Trainer, run: _Run) -> Path:
        if self.records is None:
            raise AssertionError("There are no records to write beside.")
        path = self.records.directory / f"memory_rank_{trainer.global_rank}_step_{trainer.global_step}.json"
        path.write_text(json.dumps(run.picture(), indent=1) + "\n", encoding="utf-8")
        if run.engine.device.type == "cuda":
            dump_allocator(path.with_suffix(".pickle"))
        return path


def _names(rank: int) -> tuple[str, str]:
    return f"used {rank}", f"peak {rank}"


class _Run:
    """What is known of a run while it trains.

    Args:
        trainer: that trains.
        engine: of its module.
    """

    part: Part

    def __init__(self, trainer: pl.Trainer, engine: Engine) -> None:
        self.trainer, self.engine = trainer, engine
        self.step = MemoryOfStep(engine)
        self.updates, self.is_first = trainer.global_step, True
        self.samples: int | None = None
        self.closely = False
        """Whether the step that runs is looked at in each phase."""
        self.at_step: HeldMemory | None = None
        self.ranks = range(torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
        self.names = [name for rank in self.ranks for name in _names(rank)]
        # State that is still to be made may have its room already, which takes no memory before the first step.
        self.held_before = self.held()
        self.step.note_rest(self.step.gauge.read(), self.held_before.without("optimizer"))

    def enter(self, phase: Phase) -> Usage | None:
        """Begin a phase; return what is in use, in a step that is looked at closely."""
        if self.closely:
            return self.step.enter_closely(phase)
        self.step.enter(phase)
        return None

    def held(self) -> HeldMemory:
        """Return what this rank holds now."""
        return held_memory(self.engine, self.trainer.optimizers)

    def held_in_step(self) -> HeldMemory:
        """Return what this rank holds in the middle of a step."""
        return held_memory(self.engine, self.trainer.optimizers, before=self.held_before)

    def values(self, usage: Usage, held: HeldMemory) -> dict[str, Value]:
        """Return what is logged after a step.

        Args:
            usage: now.
            held: now.
        """
        at_backward, at_step = self.step.at_backward or held, self.at_step or held
        is_whole = at_backward.total("gradients") > at_step.total("gradients")
        moments = {"gradients": at_backward if is_whole else at_step, "gathered": at_backward}
        values: dict[str, Value] = {f"memory/{name}_bytes": moments.get(name, held).total(name) for name in CATEGORIES}
        elsewhere: tuple[Tier, ...] = ("host", "file")
        for tier in elsewhere:
            sizes = {name: moments.get(name, held).total(name, tier=tier) for name in CATEGORIES if name in _ELSEWHERE}
            values.update({f"memory/{tier}_{name}_bytes": size for name, size in sizes.items() if size})
        values["memory/activations_bytes"] = self.step.activations_bytes
        values["memory/other_bytes"] = usage.used_bytes - held.total()
        values["memory/used_bytes"] = usage.used_bytes
        values["memory/limit_bytes"] = self.step.gauge.limit_bytes
        if usage.reserved_bytes is not None:
            values["memory/reserved_bytes"] = usage.reserved_bytes
            values["memory/allocation_retries"] = usage.retries
            values["memory/host_used_bytes"] = process_bytes()
        return values

    def load(self, held: HeldMemory) -> Load:
        """Return what the rank holds in a step, for advice."""
        units = dict(unit_bytes(self.engine))
        root, parameters = units.pop(ROOT), held.total("parameters")
        made = held.total("optimizer")
        is_offloaded = self.engine.plan.settings.offload.optimizer is not None
        inputs = self.step.look.inputs.values()
        return Load(
            parameters=parameters,
            gradients=max(parameters, held.total("gradients")),
            optimizer=made if is_offloaded else max(made, state_bytes(self.trainer.optimizers)),
            activations=self.step.activations_bytes,
            units=tuple(units.values()),
            root=root,
            block_input=max(inputs, default=0),
            window=int(self.trainer.accumulate_grad_batches),
            samples=self.samples,
        )

    def modules(self, held: HeldMemory) -> Mapping[str, Mapping[str, int]]:
        """Return what each module holds on the device, with its activations where they were looked at."""
        found: dict[str, dict[str, int]] = {
            name: {str(category): size for category, size in sizes.items()}
            for name, sizes in held.by_owner(unit_bytes(self.engine)).items()
        }
        for name, size in self.step.look.kept.items():
            found.setdefault(name, {})["activations"] = size
        return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))

    def picture(self) -> dict[str, Any]:
        """Return all that is known now, as plain data."""
        held, usage = self.held(), self.step.gauge.read()
        places: tuple[Tier, ...] = ("device", "host", "file")
        tiers = {tier: {name: held.total(name, tier=tier) for name in CATEGORIES} for tier in places}
        return {
            "rank": self.trainer.global_rank,
            "step": self.trainer.global_step,
            "phase": self.step.phase,
            "used_bytes": usage.used_bytes,
            "limit_bytes": self.step.gauge.limit_bytes,
            "bytes": tiers,
            "modules": self.modules(held),
        }


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _failure(trainer: pl.Trainer, run: _Run, error: BaseException) -> Failure:
    held, usage = run.held(), run.step.gauge.read()
    activations = run.step.activations_at(usage.peak_bytes, held)
    run.step.activations_bytes = max(run.step.activations_bytes, activations)
    categories = {str(name): held.total(name) for name in CATEGORIES}
    known = sum(categories.values())
    return Failure(
        rank=trainer.global_rank,
        step=trainer.global_step,
        phase=_IN_WORDS[run.step.phase],
        inside=run.step.look.inside,
        asked=asked_for(error),
        used_bytes=usage.peak_bytes,
        limit_bytes=run.step.gauge.limit_bytes,
        addresses_bytes=address_limit_bytes() if run.engine.device.type == "cpu" else None,
        categories={
            **categories,
            "activations": activations,
            "other": max(0, usage.peak_bytes - known - activations),
        },
        modules=run.modules(held),
        savings=savings(run.engine.plan, run.load(held)),
    )
