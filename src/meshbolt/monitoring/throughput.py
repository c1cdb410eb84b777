"""How fast a run goes: names, and the arithmetic of rates."""

from __future__ import annotations

from meshbolt.monitoring.metric import Metric

METRICS = (
    Metric(
        "throughput/samples_per_second",
        "samples/s",
        "Samples that all ranks together train on in a second; ranks that share a batch count it once.",
        "samples of the window's steps, summed over data-parallel ranks / time of these steps",
    ),
)
