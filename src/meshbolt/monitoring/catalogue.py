"""Every metric that is logged: what is not listed here is not logged."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from meshbolt.errors import ConfigError, did_you_mean
from meshbolt.monitoring import communication, memory, offload, ranks, throughput
from meshbolt.monitoring.metric import Metric

# One tuple for each kind, in the order of the page that lists them.
KINDS: tuple[tuple[Metric, ...], ...] = (
    throughput.METRICS,
    memory.METRICS,
    communication.METRICS,
    ranks.METRICS,
    offload.METRICS,
)


def _by_name(kinds: tuple[tuple[Metric, ...], ...]) -> Mapping[str, Metric]:
    metrics = [metric for kind in kinds for metric in kind]
    named = {metric.name: metric for metric in metrics}
    if len(named) != len(metrics):
        raise ValueError("Two metrics have one name.")
    return MappingProxyType(named)


CATALOGUE: Mapping[str, Metric] = _by_name(KINDS)


def find_metric(name: str) -> Metric:
    """Return the metric of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CATALOGUE:
        raise ConfigError(
            f"{name!r} is not in the catalogue of metrics{did_you_mean(name, CATALOGUE)}. Add it to the METRICS of its "
            f"kind in meshbolt.monitoring, with its unit, meaning and formula."
        )
    return CATALOGUE[name]
