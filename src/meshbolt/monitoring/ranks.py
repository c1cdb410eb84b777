"""Which rank keeps the others waiting a little in every step: names, and the arithmetic from times of ranks.

Ranks wait for each other in every step, so that all steps take equally long. What differs is how much of one a rank has to do
itself: the step without what it waits for other ranks. The rank with the most is the one that all others wait for.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from meshbolt.monitoring.metric import Metric
from meshbolt.monitoring.records import Value

DATA, COMPUTE = "data wait", "compute"
_OWN = "time of a step less what the rank waits in it for others; mean over the steps since the last log"
METRICS = (
    Metric(
        "ranks/slowest_rank",
        "rank",
        "The rank for which the others wait: it has the most to do by itself in a step.",
        f"the rank with the largest own time: {_OWN}",
    ),
    Metric("ranks/slowest_host", "text", "The machine of that rank.", "its host name"),
    Metric(
        "ranks/slowest_part",
        "text",
        "What it takes longer for than others: 'data wait', for its loader, or 'compute', all else that it does itself.",
        "the part in which it exceeds the median over ranks by more",
    ),
    Metric("ranks/slowest_seconds", "seconds", "Its own time in a step.", _OWN),
    Metric(
        "ranks/median_seconds",
        "seconds",
        "The own time that half of the ranks do not exceed.",
        f"median over ranks of: {_OWN}",
    ),
    Metric(
        "ranks/fastest_seconds",
        "seconds",
        "The own time of the rank with the least to do.",
        f"minimum over ranks of: {_OWN}",
    ),
    Metric(
        "ranks/behind_seconds",
        "seconds",
        "By how much each step would be shorter, about, if the slowest rank were as fast as the median one.",
        "ranks/slowest_seconds - ranks/median_seconds",
    ),
    Metric(
        "ranks/behind_fraction",
        "fraction",
        "The same as a part of the step.",
        "ranks/behind_seconds / step time of the slowest rank",
    ),
)


@dataclass(frozen=True)
class RankTimes:
    """Where the time of a rank's steps goes, in seconds; means over some steps.

    Attributes:
        step: all of it.
        data: waiting for its loader.
        waited: waiting for other ranks.
    """

    step: float
    data: float
    waited: float

    @property
    def compute(self) -> float:
        """All else: what it does itself."""
        return max(0.0, self.step - self.data - self.waited)

    @property
    def own(self) -> float:
        """What others may have to wait for."""
        return self.data + self.compute


def mean_of(times: Sequence[RankTimes]) -> RankTimes:
    """Return the mean over steps; there is at least one."""
    return RankTimes(*(statistics.fmean(getattr(each, name) for each in times) for name in ("step", "data", "waited")))


def spread_over(ranks: Sequence[RankTimes], hosts: Sequence[str]) -> dict[str, Value]:
    """Return who is slowest, by how much, and in what.

    Args:
        ranks: of each rank, in their order.
        hosts: their machines.

    Returns:
        By name in the catalogue.
    """
    own = [each.own for each in ranks]
    slowest = max(range(len(own)), key=own.__getitem__)
    times = ranks[slowest]
    # Of two ranks the median is between them: each is compared with the other.
    others = [each for rank, each in enumerate(ranks) if rank != slowest] or list(ranks)
    median = statistics.median(own) if len(own) > 2 else others[0].own
    more = {
        DATA: times.data - statistics.median(each.data for each in others),
        COMPUTE: times.compute - statistics.median(each.compute for each in others),
    }
    behind = times.own - median
    return {
        "ranks/slowest_rank": slowest,
        "ranks/slowest_host": hosts[slowest],
        "ranks/slowest_part": max(more, key=more.__getitem__),
        "ranks/slowest_seconds": times.own,
        "ranks/median_seconds": median,
        "ranks/fastest_seconds": min(own),
        "ranks/behind_seconds": behind,
        "ranks/behind_fraction": behind / times.step if times.step > 0 else 0.0,
    }
