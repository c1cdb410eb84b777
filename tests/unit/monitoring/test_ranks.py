"""Who is slowest, by how much, and in what."""

from __future__ import annotations

import pytest

from meshbolt.monitoring import CATALOGUE
from meshbolt.monitoring.ranks import METRICS, RankTimes, mean_of, spread_over


def test_the_rank_with_the_largest_own_time_is_the_slowest() -> None:
    ranks = [RankTimes(1.0, 0.1, 0.3), RankTimes(1.0, 0.1, 0.0), RankTimes(1.0, 0.1, 0.2), RankTimes(1.0, 0.1, 0.4)]
    values = spread_over(ranks, ["a", "a", "b", "b"])
    assert values.keys() == {metric.name for metric in METRICS} <= CATALOGUE.keys()
    assert (values["ranks/slowest_rank"], values["ranks/slowest_host"]) == (1, "a")
    assert values["ranks/slowest_part"] == "compute"
    assert values["ranks/slowest_seconds"] == pytest.approx(1.0)
    assert values["ranks/median_seconds"] == pytest.approx(0.75)
    assert values["ranks/fastest_seconds"] == pytest.approx(0.6)
    assert values["ranks/behind_seconds"] == pytest.approx(0.25)
    assert values["ranks/behind_fraction"] == pytest.approx(0.25)


def test_a_loader_is_told_from_computing() -> None:
    ranks = [RankTimes(1.0, 0.05, 0.4), RankTimes(1.0, 0.5, 0.0), RankTimes(1.0, 0.05, 0.4)]
    assert spread_over(ranks, ["a"] * 3)["ranks/slowest_part"] == "data wait"


def test_of_two_ranks_each_is_compared_with_the_other() -> None:
    values = spread_over([RankTimes(1.0, 0.0, 0.0), RankTimes(1.0, 0.0, 0.4)], ["a", "b"])
    assert (values["ranks/slowest_rank"], values["ranks/behind_seconds"]) == (0, pytest.approx(0.4))


def test_one_rank_is_behind_nobody() -> None:
    values = spread_over([RankTimes(1.0, 0.2, 0.0)], ["a"])
    assert (values["ranks/slowest_rank"], values["ranks/behind_seconds"]) == (0, 0.0)


def test_times_are_means_over_steps() -> None:
    mean = mean_of([RankTimes(1.0, 0.2, 0.4), RankTimes(2.0, 0.4, 0.0)])
    assert (mean.step, mean.data, mean.waited) == (1.5, pytest.approx(0.3), 0.2)
    assert mean.own == pytest.approx(1.3)
