from __future__ import annotations

import pytest

from meshbolt.errors import ConfigError
from meshbolt.monitoring import CATALOGUE, Metric, find_metric
from meshbolt.monitoring.catalogue import _by_name


def test_every_metric_is_found_by_its_name() -> None:
    assert all(find_metric(name) is metric for name, metric in CATALOGUE.items())
    assert all(metric.meaning.endswith(".") and metric.formula for metric in CATALOGUE.values())


def test_an_unknown_name_is_refused_with_the_closest_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'throughput/samples_per_second'"):
        find_metric("throughput/sample_per_second")


def test_two_metrics_of_one_name_are_refused() -> None:
    metric = Metric("a/b_bytes", "bytes", "x", "y")
    with pytest.raises(ValueError, match="one name"):
        _by_name(((metric,), (metric,)))


@pytest.mark.parametrize("name", ["plain", "Big/name", "a/b/c", "a/", "a b/c"])
def test_a_name_without_a_kind_or_in_other_letters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a metric"):
        Metric(name, "count", "x", "y")


def test_a_name_ends_in_its_unit() -> None:
    with pytest.raises(ValueError, match="_bytes"):
        Metric("memory/held", "bytes", "x", "y")
