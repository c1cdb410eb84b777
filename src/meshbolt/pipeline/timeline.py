"""When each stage computes which microbatch, and how long ranks wait: a schedule played through without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meshbolt.pipeline.schedule import find_schedule, order_of


@dataclass(frozen=True, kw_only=True)
class Span:
    """One piece of work of a rank.

    Attributes:
        rank: who does it.
        stage: of which stage.
        microbatch: of which microbatch.
        work: "F" forward, "B" backward, "I" backward for inputs only, "W" backward for parameters only.
        start: when it begins.
        end: when it is done.
    """

    rank: int
    stage: int
    microbatch: int
    work: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step, in the unit of the costs that were given.

    Attributes:
        schedule: its name.
        ranks: how many.
        stages: of all ranks.
        microbatches: of the step.
        spans: all work, each rank's in its order.
    """

    schedule: str
    ranks: int
    stages: int
    microbatches: int
    spans: tuple[Span, ...]

    @property
    def end(self) -> float:
        """When the last work is done."""
        return max(span.end for span in self.spans)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait."""
        return 1.0 - sum(span.end - span.start for span in self.spans) / (self.ranks * self.end)

    def live(self, rank: int) -> int:
        """Return of how many microbatches a rank holds activations at once, at most; a microbatch counts for each stage."""
        events = [(span.end, -1) for span in self.spans if span.rank == rank and span.work in ("B", "W")]
        events += [(span.start, 1) for span in self.spans if span.rank == rank and span.work == "F"]
        held = most = 0
        for _, change in sorted(events):
            held += change
            most = max(most, held)
        return most


def plan_timeline(
    schedule: str,
    costs: Sequence[float],
    *,
    ranks: int,
    microbatches: int,
    backward_costs: Sequence[float] | None = None,
    split_backward: bool | Sequence[float] = False,
) -> Timeline:
    """Play a schedule through.

    Args:
        schedule: its name.
        costs: of the forward pass of one microbatch, by stage.
        ranks: among which the stages are distributed.
        microbatches: of a step.
        backward_costs: of its backward pass; None: each takes twice as long.
        split_backward: schedules that compute gradients of parameters apart do so, in half of the time of a backward pass;
            or the part of that time, by stage, which gradients of inputs take: 1.0 where nothing is computed apart, 0.0 where
            gradients of inputs are not needed.

    Raises:
        ConfigError: there is no such schedule, or it cannot be for these numbers.

    Example:
        >>> timeline = plan_timeline("1f1b", [1.0, 1.0], ranks=2, microbatches=4)
        >>> timeline.end, round(timeline.bubble, 2)
        (15.0, 0.2)
    """
    order = find_schedule(schedule, stages=len(costs), ranks=ranks, microbatches=microbatches)
    waiting = {rank: list(actions) for rank, actions in enumerate(order_of(order, len(costs), ranks, microbatches))}
    backward = [2.0 * cost for cost in costs] if backward_costs is None else list(backward_costs)
    if isinstance(split_backward, bool):
        split_backward = [0.5 if split_backward else 1.0] * len(costs)
    done: dict[tuple[str, int, int], float] = {}
    free, spans = dict.fromkeys(waiting, 0.0), list[Span]()
    while any(waiting.values()):
        rank = next(rank for rank, actions in waiting.items() if actions and _may_start(actions[0], len(costs), done))
        work, stage, microbatch = waiting[rank].pop(0)
        begun = max([free[rank], *(done[each] for each in _needs(work, stage, microbatch, len(costs)))])
        of_inputs = split_backward[stage] * backward[stage]
        times = {"F": costs[stage], "B": backward[stage], "I": of_inputs, "W": backward[stage] - of_inputs}
        free[rank] = begun + times[work]
        done["B" if work == "I" else work, stage, microbatch] = free[rank]
        spans.append(Span(rank=rank, stage=stage, microbatch=microbatch, work=work, start=begun, end=free[rank]))
    return Timeline(schedule=schedule, ranks=ranks, stages=len(costs), microbatches=microbatches, spans=tuple(spans))


def _needs(work: str, stage: int, microbatch: int, stages: int) -> list[tuple[str, int, int]]:
    """Return what has to be done before a piece of work, "B" standing for the gradients of inputs."""
    if work == "F":
        return [("F", stage - 1, microbatch)] if stage else []
    if work == "W":
        return [("B", stage, microbatch)]
    return [("F", stage, microbatch), *([("B", stage + 1, microbatch)] if stage + 1 < stages else [])]


def _may_start(action: tuple[str, int, int], stages: int, done: dict[Any, float]) -> bool:
    return all(each in done for each in _needs(*action, stages))
