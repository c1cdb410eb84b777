"""If these fail, a trace is not what Chrome and Perfetto draw, or spans hide each other."""

from __future__ import annotations

import json
from pathlib import Path

from meshbolt.monitoring.trace import TraceSpan, chrome_trace, write_trace

SPANS = [
    TraceSpan("disk", "late", 10.5, 11.0),
    TraceSpan("disk", "second", 10.2, 10.4),
    TraceSpan("disk", "first", 10.0, 10.3),
    TraceSpan("step", "forward", 10.0, 11.0),
]


def test_spans_begin_at_zero_in_microseconds_in_the_lanes_asked_for(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", SPANS, rank=3, lanes=["step", "unused"])
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    assert {name: round(span["ts"]) for name, span in spans.items()} == {
        "first": 0,
        "second": 200_000,
        "late": 500_000,
        "forward": 0,
    }
    assert round(spans["second"]["dur"]) == 200_000
    assert {span["pid"] for span in spans.values()} == {3}
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"]
    assert names == ["step", "disk", "disk"]


def test_spans_that_overlap_are_in_different_lines() -> None:
    events = chrome_trace(SPANS, rank=0, lanes=[])["traceEvents"]
    lines = {event["name"]: event["tid"] for event in events if event["ph"] == "X"}
    assert lines["first"] != lines["second"]
    assert lines["first"] == lines["late"]


def test_no_spans_are_a_trace_too() -> None:
    assert len(chrome_trace([], rank=0, lanes=["step"])["traceEvents"]) == 1
