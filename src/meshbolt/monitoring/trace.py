"""Spans of time in the format of Chrome's tracing, which https://ui.perfetto.dev and chrome://tracing show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TraceSpan:
    """Something that took from one moment to another.

    Attributes:
        lane: what is drawn in one line.
        name: what it was.
        start_seconds: on any clock, the same for all.
        end_seconds: likewise.
    """

    lane: str
    name: str
    start_seconds: float
    end_seconds: float


def write_trace(path: Path, spans: Iterable[TraceSpan], *, rank: int, lanes: Sequence[str]) -> None:
    """Write a trace file, with the beginning of the first span as its zero.

    Args:
        path: of the file; its directory is there.
        spans: in any order. Those of a lane that overlap each other are drawn in lines below each other.
        rank: whose they are.
        lanes: from top to bottom; those not named here come after them.
    """
    path.write_text(json.dumps(chrome_trace(spans, rank=rank, lanes=lanes)) + "\n", encoding="utf-8")


def chrome_trace(spans: Iterable[TraceSpan], *, rank: int, lanes: Sequence[str]) -> dict[str, Any]:
    """Return what `write_trace` writes."""
    ordered = sorted(spans, key=lambda span: (span.start_seconds, span.end_seconds))
    found = [*dict.fromkeys([*lanes, *(span.lane for span in ordered)])]
    zero = ordered[0].start_seconds if ordered else 0.0
    events: list[dict[str, Any]] = [_named("process_name", rank, 0, f"rank {rank}")]
    line = 0
    for lane in found:
        for row in _rows([span for span in ordered if span.lane == lane]):
            line += 1
            events.append(_named("thread_name", rank, line, lane))
            events.append(
                {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": line, "args": {"sort_index": line}}
            )
            events.extend(_event(span, rank, line, zero) for span in row)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _rows(spans: Sequence[TraceSpan]) -> list[list[TraceSpan]]:
    """Divide spans, in the order of their beginnings, into as few lines as hold them without an overlap."""
    rows: list[list[TraceSpan]] = []
    for span in spans:
        free = next((row for row in rows if row[-1].end_seconds <= span.start_seconds), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return rows


def _event(span: TraceSpan, rank: int, line: int, zero: float) -> dict[str, Any]:
    start, took = (span.start_seconds - zero) * 1e6, (span.end_seconds - span.start_seconds) * 1e6
    return {"ph": "X", "name": span.name, "cat": span.lane, "pid": rank, "tid": line, "ts": start, "dur": took}


def _named(what: str, rank: int, line: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": line, "args": {"name": name}}
