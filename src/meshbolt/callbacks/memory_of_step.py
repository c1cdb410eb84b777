"""What memory does in a step: the peak of each phase, and what forward passes keep."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from meshbolt.compat import tree_leaves
from meshbolt.engine import Engine
from meshbolt.engine.compose import ROOT
from meshbolt.engine.memory import HeldMemory, gathered_bytes, units_of
from meshbolt.engine.pipelined import PipelinedEngine
from meshbolt.monitoring import Value
from meshbolt.monitoring.memory import Gauge, Usage, gauge_of

Phase = Literal["between", "forward", "backward", "optimizer"]


@dataclass(frozen=True)
class Peak:
    """The most that was in use, and when.

    Attributes:
        peak_bytes: on the device.
        phase: in which it was; None: the step was not looked at closely.
        step: likewise, counted from 0.
    """

    peak_bytes: int
    phase: Phase | None
    step: int


class MemoryOfStep:
    """Follows a run from phase to phase.

    Args:
        engine: of its module.

    Attributes:
        gauge: reads what is in use.
        look: who keeps what in the first forward passes.
        phase: the one that runs.
        at_backward: what was held when the last backward pass that was looked at began; in a pipeline, when most was in use.
        activations_bytes: what forward passes keep, by difference; of the last step that was looked at, once it is over.
        step_peak: of the last step.
        peak: the highest of the steps since the last log.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.gauge: Gauge = gauge_of(engine.device)
        self.look = Look(engine, self.gauge)
        self.phase: Phase = "between"
        self.at_backward: HeldMemory | None = None
        self.activations_bytes = 0
        self.step_peak = self.peak = Peak(0, "between", 0)
        # The highest of this step so far, and the phase at whose end that was seen.
        self._reached = Peak(0, "between", 0)
        # The least that was in use beside what is known, between two steps.
        self._rest_bytes: int | None = None
        # What was allocated beside what is known, between two steps, and when the last backward pass began.
        self._heap_rest_bytes: int | None = None
        self._heap_in_step_bytes: int | None = None
        self.gauge.read()
        self.gauge.reset_peak()

    def enter(self, phase: Phase) -> None:
        """Begin a phase, of a step that is not looked at closely."""
        if phase == "forward":
            self.look.begin()
        elif self.phase == "forward":
            self.look.end()
        self.phase = phase

    def enter_closely(self, phase: Phase) -> Usage:
        """Begin a phase; return what is in use, with the peak of the step so far."""
        usage = self.gauge.read()
        reached, before = usage.peak_bytes, self._reached.peak_bytes
        # Where a process keeps what it has freed, all phases have one peak: that of those that compute.
        if reached > before or (reached == before and self._reached.phase == "between"):
            self._reached = Peak(reached, self.phase, 0)
        self.enter(phase)
        return usage

    def follow(self, held: Callable[[], HeldMemory] | None) -> None:
        """In a pipeline, look at what is held wherever a microbatch has passed forwards, and keep where most was in use.

        Args:
            held: returns what is held now; None: look no more.
        """
        if not isinstance(self._engine, PipelinedEngine):
            return
        highest = 0

        def passed(held: Callable[[], HeldMemory]) -> None:
            nonlocal highest
            usage, heap = self.gauge.read(), self.gauge.heap_bytes()
            level = usage.used_bytes if heap is None else heap
            if level > highest:
                highest = level
                self.note_forward(usage, held())

        self._engine.after_forward = None if held is None else functools.partial(passed, held)

    def note_forward(self, usage: Usage, held: HeldMemory) -> None:
        """Note what is held where a backward pass begins."""
        self.at_backward = held
        self.activations_bytes = self.activations_at(usage.used_bytes, held)
        self._heap_in_step_bytes = self._heap_beside(held)
        self._take_from_heap()

    def note_rest(self, usage: Usage, held: HeldMemory) -> None:
        """Note what is held between two steps."""
        rest = usage.used_bytes - held.total()
        self._rest_bytes = rest if self._rest_bytes is None else min(self._rest_bytes, rest)
        self._heap_rest_bytes = self._heap_beside(held)
        self._take_from_heap()

    def _heap_beside(self, held: HeldMemory) -> int | None:
        heap = self.gauge.heap_bytes()
        return None if heap is None else heap - held.total()

    def _take_from_heap(self) -> None:
        """Compare what is allocated in the step and after it, both times without what is known."""
        if self._heap_in_step_bytes is not None and self._heap_rest_bytes is not None:
            self.activations_bytes = max(0, self._heap_in_step_bytes - self._heap_rest_bytes)

    def activations_at(self, used_bytes: int, held: HeldMemory) -> int:
        """Return what forward passes keep, where so much is in use and held."""
        return max(0, used_bytes - held.total() - (self._rest_bytes or 0))

    def end_step(self, step: int, *, closely: bool) -> None:
        """Take the peak of a step, and begin that of the next.

        Args:
            step: its number.
            closely: it was looked at in each phase.
        """
        reached = self._reached if closely else Peak(self.gauge.read().peak_bytes, None, step)
        self.step_peak = Peak(reached.peak_bytes, reached.phase, step)
        self.peak = max(self.peak, self.step_peak, key=lambda peak: peak.peak_bytes)
        self._reached = Peak(0, "between", 0)
        self.gauge.reset_peak()

    def begin_interval(self) -> None:
        """Forget the peaks that are logged."""
        self.peak = Peak(0, "between", 0)

    def values(self) -> dict[str, Value]:
        """Return what is logged of peaks."""
        return {
            "memory/step_peak_bytes": self.step_peak.peak_bytes,
            "memory/step_peak_phase": self.step_peak.phase,
            "memory/peak_bytes": self.peak.peak_bytes,
            "memory/peak_phase": self.peak.phase,
            "memory/peak_step": self.peak.step,
        }

    def close(self) -> None:
        """Let go of the module."""
        self.follow(None)
        self.look.close()


class Look:
    """Watches units run forwards: which one runs, what goes into them, and in the first pass what they keep.

    Args:
        engine: of the module.
        gauge: reads what is in use.

    Attributes:
        kept: in bytes, by the unit's name: what was in use more after its forward than before it, without gathered parameters.
        inputs: bytes of the tensors that go into a unit, by its name.
    """

    def __init__(self, engine: Engine, gauge: Gauge) -> None:
        self.kept: dict[str, int] = {}
        self.inputs: dict[str, int] = {}
        self._engine, self._gauge = engine, gauge
        self._running: list[str] = []
        self._before: defaultdict[str, list[int]] = defaultdict(list)
        self._is_measuring, self._was_measured = False, False
        self._hooks: list[Any] = []
        # Hooks would have compiled blocks compiled again.
        if not engine.plan.settings.compile:
            for name, unit in units_of(engine).items():
                if name != ROOT:
                    self._watch(name, cast("nn.Module", unit))

    @property
    def inside(self) -> str | None:
        """The unit that runs forwards, or did when an exception ended it."""
        return self._running[-1] if self._running else None

    def begin(self) -> None:
        """Begin a forward pass of the whole module."""
        self._running.clear()
        self._is_measuring = not self._was_measured
        self._was_measured = True

    def end(self) -> None:
        """End it."""
        self._running.clear()
        self._is_measuring = False

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _watch(self, name: str, module: nn.Module) -> None:
        self._hooks.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
        self._hooks.append(module.register_forward_hook(self._leaving(name)))

    def _entering(self, name: str) -> Callable[..., None]:
        def entering(_module: nn.Module, args: Any) -> None:
            self._running.append(name)
            if self._is_measuring:
                self._before[name].append(self._without_gathered())
                self.inputs[name] = sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))

        return entering

    def _leaving(self, name: str) -> Callable[..., None]:
        def leaving(_module: nn.Module, _args: Any, _output: Any) -> None:
            if self._running and self._running[-1] == name:
                self._running.pop()
            if self._is_measuring and self._before[name]:
                grown = self._without_gathered() - self._before[name].pop()
                self.kept[name] = self.kept.get(name, 0) + max(0, grown)

        return leaving

    def _without_gathered(self) -> int:
        heap = self._gauge.heap_bytes()
        return (self._gauge.read().used_bytes if heap is None else heap) - gathered_bytes(self._engine)
