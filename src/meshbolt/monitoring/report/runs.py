"""Which runs have left records in a directory, and which of their records count.

A run that was restarted goes on from a checkpoint: it has several attempts, and steps that came after that checkpoint are run
again. What the first attempt recorded of these steps is no part of the run any more.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshbolt.monitoring.records import Record, read_records

_FILES = "rank_*.jsonl"
# How `Records` begins a line.
_HEAD = re.compile(
    rb'\{"kind": "([^"\\]*)", "step": (\d+), "time_seconds": (\d+(?:\.\d+)?), "rank": \d+, "run": "([^"\\]*)"'
)


@dataclass
class Attempt:
    """The records of one start of a program.

    Attributes:
        name: which the records carry as "run".
        begun: time of the first record, in seconds since 1970.
        ended: time of the last one.
        start: what was written at the start, if anything was.
        end: what was written at the end, if it came so far.
        last_step: that any record is of.
    """

    name: str
    begun: float
    ended: float = 0.0
    start: Record | None = None
    end: Record | None = None
    last_step: int = 0

    @property
    def first_step(self) -> int:
        """The step from which it went on; 0 for one that began anew."""
        return int(self.start["step"]) if self.start else 0

    @property
    def goes_on(self) -> bool:
        """Whether it goes on where an earlier one was, by a checkpoint, or because a scheduler started it again."""
        return self.start is not None and (self.first_step > 0 or int(self.start.get("restarts") or 0) > 0)


@dataclass
class Run:
    """Attempts that belong together.

    Attributes:
        directory: with the files of all ranks.
        attempts: in the order of their time; one or more.
    """

    directory: Path
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def begun(self) -> float:
        """When it began, in seconds since 1970."""
        return self.attempts[0].begun

    @property
    def ended(self) -> float:
        """When it last wrote something, in seconds since 1970."""
        return max(attempt.ended for attempt in self.attempts)

    @property
    def start(self) -> Record:
        """What was written at the last start; empty where nothing was."""
        starts = [attempt.start for attempt in self.attempts if attempt.start is not None]
        return starts[-1] if starts else {}

    @property
    def end(self) -> Record | None:
        """What the last attempt wrote at its end; None where it did not come to that, or is still running."""
        return self.attempts[-1].end

    @property
    def last_step(self) -> int:
        """The last step of the last attempt."""
        return self.attempts[-1].last_step

    def records(self) -> Iterator[Record]:
        """Yield what counts, in the order of time: without steps that a later attempt ran again."""
        goes_on_at = {attempt.name: math.inf for attempt in self.attempts}
        bound = math.inf
        for attempt in reversed(self.attempts):
            goes_on_at[attempt.name] = bound
            bound = min(bound, attempt.first_step)
        for record in read_records(self.directory):
            name = str(record.get("run", ""))
            if name not in goes_on_at:
                continue
            # What happened, happened; what was measured of a step that was run again, is measured again.
            if record["kind"] in ("event", "run", "rank") or step_of(record) <= goes_on_at[name]:
                yield record


def find_runs(directory: str | Path) -> list[Run]:
    """Return the runs whose records are in a directory or below it, the oldest first.

    Args:
        directory: any above the files.
    """
    top = Path(directory)
    places = sorted({path.parent for path in top.rglob(_FILES)})
    runs = [run for place in places for run in _runs_in(place)]
    return sorted(runs, key=lambda run: run.begun)


def step_of(record: Record) -> int:
    """Return the step of a record, 0 where it has none."""
    step: Any = record.get("step")
    return int(step) if isinstance(step, (int, float)) and math.isfinite(step) else 0


def _runs_in(place: Path) -> list[Run]:
    attempts: dict[str, Attempt] = {}
    seen = (each for path in sorted(place.glob(_FILES)) for each in _seen_in(path))
    for name, seconds, step, record in seen:
        attempt = attempts.setdefault(name, Attempt(name, seconds))
        attempt.begun, attempt.ended = min(attempt.begun, seconds), max(attempt.ended, seconds)
        attempt.last_step = max(attempt.last_step, step)
        if record is not None and not record.get("rank"):
            what = record["values"].get("what")
            if what == "start":
                attempt.start = record
            elif what == "end":
                attempt.end = record
    runs: list[Run] = []
    for attempt in sorted(attempts.values(), key=lambda each: each.begun):
        if runs and attempt.goes_on:
            runs[-1].attempts.append(attempt)
        else:
            runs.append(Run(place, [attempt]))
    return runs


def _seen_in(path: Path) -> Iterator[tuple[str, float, int, Record | None]]:
    """Yield of each record its run, time and step, and itself where it tells of a start or an end.

    Nearly all lines are known by their beginnings, so that a directory is looked through in a fraction of the time of reading it.
    """
    with path.open("rb") as file:
        for line in file:
            head = _HEAD.match(line)
            if head is not None and head[1] != b"run" and line.endswith(b"}\n"):
                yield head[4].decode(), float(head[3]), int(head[2]), None
            elif (record := _parsed(line)) is not None:
                own = record if record["kind"] == "run" and isinstance(record["values"], dict) else None
                yield str(record.get("run", "")), float(record["time_seconds"]), step_of(record), own


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_whole = isinstance(record, dict) and {"kind", "time_seconds", "values"} <= record.keys()
    return record if is_whole and isinstance(record["time_seconds"], (int, float)) else None
