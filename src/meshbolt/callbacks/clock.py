"""Where the time of steps goes: moments at which a phase begins, on the clock of the device, read when they are there.

On a GPU a moment is an event in its stream. Those of a step are read after the step behind it, or later: nobody waits for them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import torch

Phase = Literal["between", "fetch", "forward", "backward", "optimizer", "after", "pause"]


@dataclass(frozen=True)
class StepTimes:
    """How long a step took.

    Attributes:
        number: as the caller counts.
        seconds: from the end of the step before it, without pauses.
        phases: in seconds; they add up to that.
        exposed: of these, what each phase waited for other ranks; None where nobody has watched.
        note: what the caller has given.
    """

    number: int
    seconds: float
    phases: Mapping[str, float]
    exposed: Mapping[str, float] | None
    note: Any


@dataclass
class _Step:
    """A step of which not all is read."""

    number: int = -1
    marks: list[tuple[Phase, Any]] = field(default_factory=list)
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    watched: bool = False
    note: Any = None


class StepClock:
    """Notes when each phase of a step begins.

    Args:
        device: where the step computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._step = _Step()
        self._pending: deque[_Step] = deque()
        self._free: list[Any] = []

    @property
    def phase(self) -> Phase | None:
        """The one that is running; None before the first."""
        return self._step.marks[-1][0] if self._step.marks else None

    def begin(self, phase: Phase) -> None:
        """Note that a phase begins, and the one before it ends."""
        self._step.marks.append((phase, self._now()))

    def pause(self) -> None:
        """Note that a pause began when the last batch ended: validation gets its first batches before it says so."""
        marks = self._step.marks
        for number in reversed(range(len(marks))):
            if marks[number][0] not in ("between", "fetch"):
                break
            marks[number] = "pause", marks[number][1]
        self.begin("pause")

    def watch(self) -> None:
        """Say that from here on all waits of this step are told of."""
        self._step.watched = True

    def waiting(self) -> Any:
        """Note that the step begins to wait for other ranks; give the result to `waited`."""
        return self._now() if self._step.watched else None

    def waited(self, since: Any) -> None:
        """Note that a wait has ended."""
        if since is not None:
            self._step.waits.append((since, self._now()))

    def end_step(self, number: int, note: Any) -> None:
        """End a step, whose number and note come back with its times; the next one begins."""
        step = self._step
        now = self._now()
        step.marks.append(("between", now))
        step.number, step.note = number, note
        self._pending.append(step)
        self._step = _Step(marks=[("between", now)])

    def read(self, *, last: int | None = None, wait: bool = False) -> list[StepTimes]:
        """Return the steps that are there by now, each once, in their order.

        Args:
            last: the number of the last one to return; None: all.
            wait: for them, at the end of a run.
        """
        found: list[StepTimes] = []
        while self._pending and (wait or self._is_there(self._pending[0])):
            if last is not None and self._pending[0].number > last:
                break
            found.append(self._times(self._pending.popleft(), wait=wait))
        return found

    def _times(self, step: _Step, *, wait: bool) -> StepTimes:
        if wait and self._on_gpu:
            step.marks[-1][1].synchronize()
        phases: dict[str, float] = defaultdict(float)
        exposed: dict[str, float] = defaultdict(float)
        waits = [(self._between(step.marks[0][1], since), self._between(since, until)) for since, until in step.waits]
        waits.reverse()
        begun = 0.0
        for (phase, since), (_, until) in itertools.pairwise(step.marks):
            seconds = self._between(since, until)
            phases[phase] += seconds
            begun += seconds
            while waits and waits[-1][0] < begun:
                exposed[phase] += waits.pop()[1]
        phases.pop("pause", None)
        exposed.pop("pause", None)
        self._recycle(step)
        return StepTimes(
            number=step.number,
            seconds=sum(phases.values()),
            phases=dict(phases),
            exposed=dict(exposed) if step.watched else None,
            note=step.note,
        )

    def _now(self) -> Any:
        if not self._on_gpu:
            return perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _is_there(self, step: _Step) -> bool:
        return not self._on_gpu or bool(step.marks[-1][1].query())

    def _between(self, since: Any, until: Any) -> float:
        return float(since.elapsed_time(until)) / 1e3 if self._on_gpu else float(until - since)

    def _recycle(self, step: _Step) -> None:
        if self._on_gpu:
            # The last moment is the next step's first one.
            self._free.extend([*(moment for _, moment in step.marks[:-1]), *itertools.chain(*step.waits)])
