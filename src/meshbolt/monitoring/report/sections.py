"""Sections that are no curves: communication, a step of a pipeline, what happened, settings, machines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from meshbolt.monitoring.report.charts import Span, legend
from meshbolt.monitoring.report.curves import by_unit, cards, of_ranks, over_ranks, texts
from meshbolt.monitoring.report.facts import status_of
from meshbolt.monitoring.report.gather import MOST_EVENTS, Event, Gathered
from meshbolt.monitoring.report.tables import missing, note, pairs, table
from meshbolt.monitoring.report.wording import NOTHING, format_date, format_duration, write

_PASSES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, parameters"}
_COLOURS = {"F": 0, "B": 1, "I": 1, "W": 2}
_DEFAULT = "default"


def communication(found: Gathered, span: Span) -> str:
    """Return what was sent over each axis, by collective.

    Args:
        found: of the run.
        span: steps.
    """
    measured = found.kind("communication")
    if not found.communication and not measured:
        return missing("Nobody measured communication.", "Trainer(callbacks=[RunReport(), CommunicationMonitor()])")
    rows = defaultdict[tuple[str, str], list[list[float]]](list)
    for (axis, collective, _rank), sums in found.communication.items():
        rows[axis, collective].append(sums)
    lines = [
        _of_collective(axis, collective, sums, found.ceilings.get((axis, collective)))
        for (axis, collective), sums in sorted(rows.items(), key=lambda item: -sum(each[1] for each in item[1]))
    ]
    heads = ["axis", "collective", "calls", "bytes", "time", "of it waits", "bytes/s", "of the ceiling"]
    drawn = table(heads, lines, numbers=range(2, 8), name="communication") if lines else ""
    words = (
        "Of one rank, as the mean over ranks, in all steps that were recorded. Time goes from a call to the end of its wait; "
        "the ceiling is what the same collective had on this machine with nothing beside it."
    )
    said = note(words) if lines else ""
    return said + drawn + cards(by_unit(measured, span))


def pipeline(found: Gathered) -> str:
    """Return a step of a pipeline: which rank computed what when, and the same step by its schedule alone.

    Args:
        found: of the run.
    """
    record = found.pipeline
    if record is None:
        return missing("No step of the pipeline was measured.", "RunReport()  # measures one by itself, step 3")
    drawn = []
    longest = max(float(each["end_seconds"]) for each in record["timelines"]) or 1.0
    for each in record["timelines"]:
        end = float(each["end_seconds"])
        said = f"{each['name']}: {write(end, 'seconds')}, ranks waited {float(each['bubble']):.1%} of it"
        drawn.append(f"<h3>{escape(said)}</h3>{_lanes(each, longest)}")
    stages = record.get("stages")
    words = (
        f"Step {record['step']:,}, schedule {record.get('schedule')}, {stages} stages, "
        f"{record.get('microbatches')} microbatches. Time runs from left to right; numbers are microbatches."
    )
    done = {str(span[3]) for each in record["timelines"] for span in each["spans"]}
    keys = [(_PASSES[work], _COLOURS[work], "", "") for work in _PASSES if work in done]
    return f'{note(words)}<div class="gantt">{"".join(drawn)}</div>{legend(keys)}'


def offload(found: Gathered, span: Span) -> str:
    """Return what offloading moved.

    Args:
        found: of the run.
        span: steps.
    """
    measured = found.kind("offload")
    if not measured:
        return missing("Nobody measured what offloading moves.", "Trainer(callbacks=[RunReport(), OffloadMonitor()])")
    return over_ranks(measured) + cards(by_unit(measured, span)) + texts(found, "offload")


def others(found: Gathered, span: Span, kinds: Sequence[str]) -> str:
    """Return curves of kinds that have no section of their own.

    Args:
        found: of the run.
        span: steps.
        kinds: which.
    """
    measured = {name: curves for name, curves in found.measured.items() if name.partition("/")[0] in kinds}
    charts = of_ranks(found, span) if "ranks" in kinds else []
    drawn = cards([*charts, *by_unit(measured, span)]) + "".join(texts(found, kind) for kind in kinds)
    return (over_ranks(measured) if drawn else "") + drawn


def events(found: Gathered) -> str:
    """Return what happened, in the order of time.

    Args:
        found: of the run.
    """
    happened = all_events(found)
    rows = [
        [
            _clock(event.seconds - found.run.begun),
            f"{event.step:,}",
            f"{event.rank}",
            event.what,
            event.text,
        ]
        for event in happened
    ]
    left_out = found.num_events - len(found.events)
    said = note(f"The first {MOST_EVENTS}; {left_out:,} more are in the records.") if left_out else ""
    return f'<div class="long">{table(["after", "step", "rank", "what", ""], rows, numbers=(1,), name="events")}</div>{said}'


def all_events(found: Gathered) -> list[Event]:
    """Return what was recorded as an event, with starts, ends and numbers that are none.

    Args:
        found: of the run.
    """
    said = {(event.step, event.text) for event in found.events if event.what != "warning"}
    happened = [
        event
        for event in found.events
        # What is an event by itself is often a warning as well, with its class before it.
        if event.what != "warning" or (event.step, event.text.partition(": ")[2]) not in said
    ]
    for number, attempt in enumerate(found.run.attempts):
        what = "restart" if number else "start"
        whence = f"from step {attempt.first_step:,}" if attempt.first_step else "from the beginning"
        before = found.run.attempts[number - 1].last_step if number else 0
        again = (
            f"; steps {attempt.first_step + 1:,} to {before:,} were run again" if before > attempt.first_step else ""
        )
        happened.append(
            Event(attempt.begun, attempt.first_step, 0, what, f"{format_date(attempt.begun)}, {whence}{again}")
        )
        if attempt.end is not None:
            values = attempt.end["values"]
            text = str(values.get("text") or "")
            happened.append(Event(attempt.ended, attempt.last_step, 0, str(values.get("status", "end")), text))
    for name, envelope in found.logged.items():
        if envelope.first_not_finite is not None:
            text = f"{name} was no finite number, {envelope.num_not_finite:,} times in all"
            seconds = found.run.begun
            happened.append(Event(seconds, envelope.first_not_finite, 0, "not finite", text))
    return sorted(happened, key=lambda event: (event.seconds, event.step))


def settings(found: Gathered) -> str:
    """Return the settings of a run, with where each came from.

    Args:
        found: of the run.
    """
    rows = _settings_of(found.run.start)
    if not rows:
        return missing("The settings were not recorded.", "Trainer(callbacks=[RunReport()])")
    given = [row for row in rows if row[2] != _DEFAULT and row[1] != NOTHING]
    defaults = [(name, value, "") for name, value, origin in rows if origin == _DEFAULT or value == NOTHING]
    rest = (
        f"<details><summary>{len(defaults)} settings by default, or without a value</summary>{pairs(defaults)}</details>"
        if defaults
        else ""
    )
    call = found.run.start.get("call")
    return (f"<pre>{escape(str(call))}</pre>" if call else "") + pairs(given) + rest


def environment(found: Gathered) -> str:
    """Return versions, variables and machines.

    Args:
        found: of the run.
    """
    rows = _settings_of(found.run.start, "environment")
    if not rows and not found.machines:
        return missing("Versions and machines were not recorded.", "Trainer(callbacks=[RunReport()])")
    ranks = _machines(found.machines)
    expected = int(found.run.start.get("world_size") or 0)
    lost = expected - len(found.machines)
    said = (
        note(
            f"Records of {lost} of {expected} ranks are not in this directory. Where machines share no disk, copy "
            "rank_*.jsonl of all of them into one, and run `meshbolt report` on it."
        )
        if 0 < lost < expected
        else ""
    )
    return pairs(rows) + ranks + said


def ended(found: Gathered) -> str:
    """Return what ended a run that failed, in full.

    Args:
        found: of the run.
    """
    status, text = status_of(found)
    end = found.run.end or {}
    trace = end.get("traceback")
    shown = f"<details><summary>Traceback</summary><pre>{escape(str(trace))}</pre></details>" if trace else ""
    return f'<div class="ended"><p>{escape(text)}</p>{shown}</div>' if status != "finished" and text else ""


def _of_collective(axis: str, collective: str, sums: list[list[float]], ceiling: float | None) -> list[str]:
    means = [sum(each[place] for each in sums) / len(sums) for place in range(4)]
    calls, num_bytes, seconds, waits = (None if math.isnan(mean) else mean for mean in means)
    speed = num_bytes / seconds if num_bytes is not None and seconds else None
    part = speed / ceiling if speed is not None and ceiling else None
    return [
        axis,
        collective,
        NOTHING if calls is None else f"{calls:,.0f}",
        write(num_bytes, "bytes"),
        write(seconds, "seconds"),
        write(waits, "seconds"),
        write(speed, "bytes/s"),
        write(part, "fraction"),
    ]


def _lanes(timeline: Mapping[str, Any], longest: float) -> str:
    lanes = defaultdict[int, list[str]](list)
    for rank, stage, microbatch, work, start, end in timeline["spans"]:
        left, width = float(start) / longest, max(float(end) - float(start), 0.0) / longest
        tip = f"stage {stage}, microbatch {microbatch}: {_PASSES.get(work, work)}, {write(float(end) - float(start), 'seconds')}"
        lanes[int(rank)].append(
            f'<span class="f{_COLOURS.get(work, 7)}" style="left:{left:.3%};width:{width:.3%}" data-tip="{escape(tip)}">'
            f"{int(microbatch)}</span>"
        )
    rows = "".join(f"<b>rank {rank}</b><div>{''.join(boxes)}</div>" for rank, boxes in sorted(lanes.items()))
    return f'<div class="lanes">{rows}</div>'


def _clock(seconds: float) -> str:
    whole = max(round(seconds), 0)
    return format_duration(whole) if whole >= 60 else f"0:{whole:02}"


def _settings_of(start: Mapping[str, Any], key: str = "settings") -> list[tuple[str, str, str]]:
    rows = []
    for row in start.get(key) or ():
        if isinstance(row, (list, tuple)) and row:
            name, value, origin = (*row, "", "")[:3]
            rows.append((str(name), NOTHING if value is None else str(value), str(origin or "")))
    return rows


def _machines(machines: Mapping[int, Mapping[str, Any]]) -> str:
    if not machines:
        return ""
    names = list(dict.fromkeys(name for values in machines.values() for name in values))
    rows = [[f"{rank}", *(str(machines[rank].get(name, "–")) for name in names)] for rank in sorted(machines)]
    return "<h3>Ranks</h3>" + table(["rank", *(name.replace("_", " ") for name in names)], rows)
