"""A run in plain data, for programs."""

from __future__ import annotations

import math
from typing import Any

from meshbolt.monitoring.report.facts import facts_of, status_of
from meshbolt.monitoring.report.gather import gather
from meshbolt.monitoring.report.runs import Run


def summary_of(run: Run) -> dict[str, Any]:
    """Return what a report begins with, as JSON knows it.

    Args:
        run: as it was found.
    """
    found = gather(run)
    status, text = status_of(found)
    return {
        "directory": str(run.directory),
        "title": run.start.get("title"),
        "status": status,
        "error": text if status == "failed" else None,
        "begun_seconds": run.begun,
        "ended_seconds": run.ended,
        "attempts": len(run.attempts),
        "ranks": run.start.get("world_size") or len(found.ranks) or None,
        "figures": {fact.key: _finite(fact.value) for fact in facts_of(found)},
        "last": {name: _finite(each.last[1]) for name, each in found.logged.items() if each.last},
        "events": found.num_events,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
