"""What ranks send each other: names, and a table by axis of the mesh and collective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshbolt.monitoring.metric import Metric
from meshbolt.monitoring.records import Value

OTHER = "other"
# Axes of the mesh, and groups of several axes or of none.
AXES = ("pp", "dp_replicate", "dp_shard", "tp", OTHER)
_WHERE = {
    "pp": "between the stages of a pipeline",
    "dp_replicate": "between copies of the model",
    "dp_shard": "between the ranks that share one copy's shards",
    "tp": "between the ranks that share layers",
    OTHER: "in groups that are no axis of the mesh",
}


def _of_axis(axis: str) -> tuple[Metric, Metric]:
    return (
        Metric(
            f"communication/{axis}_bytes",
            "bytes",
            f"What goes {_WHERE[axis]} in a step, of this rank.",
            f"sum of `bytes` of the rows of {axis} / steps since the last log",
        ),
        Metric(
            f"communication/{axis}_exposed_seconds",
            "seconds",
            f"How long a step of this rank waited for what goes {_WHERE[axis]}; not known under NCCL.",
            f"sum of `exposed_seconds` of the rows of {axis} / steps since the last log",
        ),
    )


METRICS = (
    Metric(
        "communication/step_bytes",
        "bytes",
        "What goes over all axes in a step, of this rank.",
        "sum of `bytes` of all rows / steps since the last log",
    ),
    Metric(
        "communication/step_calls",
        "count",
        "Collectives and messages in a step, of this rank.",
        "sum of `calls` of all rows / steps since the last log",
    ),
    *(metric for axis in AXES for metric in _of_axis(axis)),
)


@dataclass
class Row:
    """What one collective over one axis has done.

    Attributes:
        calls: how often.
        num_bytes: of the larger side on this rank: what a gather returns, what a scatter is given, else what is sent.
        seconds: from calls to the ends of waits for them; None where nobody can tell.
        exposed_seconds: of these, in waits; None likewise.
    """

    calls: int = 0
    num_bytes: int = 0
    seconds: float | None = 0.0
    exposed_seconds: float | None = 0.0


@dataclass
class Table:
    """Rows by axis and collective.

    Attributes:
        rows: in the order of their first calls.
        ceilings: bytes per second that the same collective had over the axis with nothing beside it.
    """

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    ceilings: dict[tuple[str, str], float] = field(default_factory=dict)

    def started(self, axis: str, collective: str, num_bytes: int, *, is_timed: bool) -> Row:
        """Add a call; return its row, to which its waits are added."""
        row = self.rows.setdefault((axis, collective), Row())
        row.calls += 1
        row.num_bytes += num_bytes
        if not is_timed:
            row.seconds = row.exposed_seconds = None
        return row

    def take(self) -> dict[tuple[str, str], Row]:
        """Return the rows, and begin with none."""
        rows, self.rows = self.rows, {}
        return rows

    def written(self, rows: Mapping[tuple[str, str], Row]) -> Iterator[dict[str, Any]]:
        """Yield each row as it is recorded."""
        for (axis, collective), row in rows.items():
            yield {
                "axis": axis,
                "collective": collective,
                "calls": row.calls,
                "bytes": row.num_bytes,
                "seconds": row.seconds,
                "exposed_seconds": row.exposed_seconds,
                "bytes_per_second": row.num_bytes / row.seconds if row.seconds else None,
                "ceiling_bytes_per_second": self.ceilings.get((axis, collective)),
            }


def waited(row: Row, *, begun_seconds: float, wait_seconds: float, ended_seconds: float) -> None:
    """Add a wait to the row of what was waited for.

    Args:
        row: of the call.
        begun_seconds: when the call was made.
        wait_seconds: when the wait began.
        ended_seconds: when it ended.
    """
    if row.seconds is not None and row.exposed_seconds is not None:
        row.seconds += ended_seconds - begun_seconds
        row.exposed_seconds += ended_seconds - wait_seconds


def of_steps(rows: Mapping[tuple[str, str], Row], *, steps: int) -> dict[str, Value]:
    """Return a rank's metrics by name.

    Args:
        rows: of some steps.
        steps: how many.
    """
    values: dict[str, Value] = {
        "communication/step_bytes": sum(row.num_bytes for row in rows.values()) / steps,
        "communication/step_calls": sum(row.calls for row in rows.values()) / steps,
    }
    for axis in AXES:
        own = [row for (of, _), row in rows.items() if of == axis]
        if own:
            waits = [row.exposed_seconds for row in own if row.exposed_seconds is not None]
            values[f"communication/{axis}_bytes"] = sum(row.num_bytes for row in own) / steps
            values[f"communication/{axis}_exposed_seconds"] = sum(waits) / steps if len(waits) == len(own) else None
    return values
