"""One way through the records of a run: what of them is shown, in as much room as a page has."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshbolt.monitoring.records import Record
from meshbolt.monitoring.report.envelope import Envelope
from meshbolt.monitoring.report.runs import Run, step_of
from meshbolt.monitoring.report.wording import unit_of

# Kinds that are no metrics of a step.
_OTHERS = ("run", "rank", "event", "pipeline")
METRICS = "metrics"
MOST_EVENTS = 200
# Curves of single ranks, beyond the one of all.
_CURVES_OF_A_RANK = 200
# Of the record of a kind that compares ranks.
_OF_RANKS = ("own_seconds", "data_seconds")
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Event:
    """Something that happened once.

    Attributes:
        seconds: since 1970.
        step: of the optimizer.
        rank: that wrote it.
        what: in a word.
        text: in a sentence.
    """

    seconds: float
    step: int
    rank: int
    what: str
    text: str


@dataclass
class Curves:
    """A metric of a run: over all ranks, and of each.

    Attributes:
        whole: of all ranks.
        ranks: of each.
    """

    whole: Envelope = field(default_factory=Envelope)
    ranks: dict[int, Envelope] = field(default_factory=dict)

    def add(self, rank: int, step: int, value: float) -> None:
        """Add a value.

        Args:
            rank: whose it is.
            step: of the optimizer.
            value: any float.
        """
        self.whole.add(step, value)
        if rank not in self.ranks:
            self.ranks[rank] = Envelope(_CURVES_OF_A_RANK)
        self.ranks[rank].add(step, value)


@dataclass
class Gathered:
    """What is shown of a run.

    Attributes:
        run: it.
        logged: what the module logs, by name.
        measured: what monitors measure, by name.
        events: in the order of time.
        num_events: with those beyond the most that are kept.
        machines: what each rank said of itself.
        communication: by axis, collective and rank: calls, bytes, seconds, and of these the waits; NaN where not known.
        ceilings: bytes per second that an axis was measured to move at most.
        pipeline: the last step of a pipeline that was measured, if any.
        texts: the last text of metrics that are no numbers.
        named: how often a metric named each rank, of metrics whose numbers are ranks.
        own: times of each rank's own steps, by name, where records tell them apart from those of the run.
        of_ranks: times of all ranks, by name and rank, as one of them has collected them.
        num_records: that count.
    """

    run: Run
    logged: dict[str, Envelope] = field(default_factory=dict)
    measured: dict[str, Curves] = field(default_factory=lambda: defaultdict(Curves))
    events: list[Event] = field(default_factory=list)
    num_events: int = 0
    machines: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    communication: dict[tuple[str, str, int], list[float]] = field(
        default_factory=lambda: defaultdict(lambda: [0.0] * 4)
    )
    ceilings: dict[tuple[str, str], float] = field(default_factory=dict)
    pipeline: Record | None = None
    texts: dict[str, str] = field(default_factory=dict)
    named: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    own: dict[str, dict[int, Envelope]] = field(default_factory=lambda: defaultdict(dict))
    of_ranks: dict[str, dict[int, Envelope]] = field(default_factory=dict)
    num_records: int = 0

    @property
    def ranks(self) -> list[int]:
        """The ranks of which there are records."""
        found = {rank for curves in self.measured.values() for rank in curves.ranks} | set(self.machines)
        found |= {rank for ranks in self.own.values() for rank in ranks}
        return sorted(found)

    def kind(self, name: str) -> dict[str, Curves]:
        """Return what one monitor measures.

        Args:
            name: the part of names before the stroke.
        """
        return {each: curves for each, curves in self.measured.items() if each.partition("/")[0] == name}


def gather(run: Run) -> Gathered:
    """Go through the records of a run.

    Args:
        run: as it was found.
    """
    found = Gathered(run)
    for record in run.records():
        if isinstance(record["values"], Mapping):
            found.num_records += 1
            _take(found, record)
    found.measured = dict(found.measured)
    return found


def _take(found: Gathered, record: Record) -> None:
    kind, rank, step = str(record["kind"]), _whole(record.get("rank")), step_of(record)
    if kind == "event":
        _take_event(found, record, rank, step)
    elif kind == "rank":
        found.machines[rank] = record["values"]
    elif kind == "pipeline":
        found.pipeline = record
    elif kind not in _OTHERS:
        own = record.get("own")
        if rank == 0:
            _take_of_ranks(found, record, step)
        if isinstance(own, Mapping):
            _take_own(found, own, rank, step)
        # Where a record has a part that is the rank's own, or lists all ranks, the rest is of the run, and the same on all ranks.
        is_of_run = isinstance(own, Mapping) or any(name in record for name in _OF_RANKS)
        if not is_of_run or rank == 0:
            _take_numbers(found, record["values"], kind, rank, step)
        _take_communication(found, record.get("rows"), rank)


def _take_numbers(found: Gathered, values: Mapping[str, Any], kind: str, rank: int, step: int) -> None:
    for name, value in values.items():
        number = _NUMBERS.get(value) if isinstance(value, str) else value
        if number is None:
            if value is not None:
                found.texts[name] = str(value)
        elif not isinstance(number, (int, float)):
            continue
        elif unit_of(name) == "rank":
            # The mean of two ranks is no rank.
            found.named[name][int(number) if math.isfinite(number) else 0] += 1
        elif kind != METRICS:
            found.measured[name].add(rank, step, float(number))
        elif rank == 0:
            found.logged.setdefault(name, Envelope()).add(step, float(number))


def _take_own(found: Gathered, own: Mapping[str, Any], rank: int, step: int) -> None:
    for name, value in own.items():
        if isinstance(value, (int, float)):
            found.own[name].setdefault(rank, Envelope(_CURVES_OF_A_RANK)).add(step, float(value))


def _take_of_ranks(found: Gathered, record: Record, step: int) -> None:
    """Take lists with a number for each rank, which one rank has written for all."""
    for name in _OF_RANKS:
        values = record.get(name)
        for rank, value in enumerate(values if isinstance(values, list) else ()):
            if isinstance(value, (int, float)):
                curves = found.of_ranks.setdefault(name, {})
                curves.setdefault(rank, Envelope(_CURVES_OF_A_RANK)).add(step, float(value))


def _take_communication(found: Gathered, rows: Any, rank: int) -> None:
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, Mapping) or not {"axis", "collective", "calls", "bytes", "seconds"} <= row.keys():
            continue
        axis, collective = str(row["axis"]), str(row["collective"])
        sums = found.communication[axis, collective, rank]
        for place, name in enumerate(("calls", "bytes", "seconds", "exposed_seconds")):
            # Under NCCL nobody knows a time; a sum with such a row is not known either.
            value = row.get(name)
            sums[place] += math.nan if value is None else float(value)
        if row.get("ceiling_bytes_per_second"):
            found.ceilings[axis, collective] = float(row["ceiling_bytes_per_second"])


def _take_event(found: Gathered, record: Record, rank: int, step: int) -> None:
    found.num_events += 1
    if len(found.events) < MOST_EVENTS:
        values = record["values"]
        what, text = str(values.get("what", "event")), str(values.get("text", ""))
        found.events.append(Event(float(record["time_seconds"]), step, rank, what, text))


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0
