"""Schedules played through: what waits for what, and how long ranks wait, as the literature has it."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from meshbolt.errors import ConfigError
from meshbolt.pipeline import SCHEDULES, Timeline, draw, plan_timeline
from meshbolt.pipeline.schedule import order_of


def played(schedule: str, *, ranks: int = 4, microbatches: int = 8, split: bool = True) -> Timeline:
    stages = ranks if SCHEDULES[schedule].single else 2 * ranks
    costs = [1.0] * stages
    return plan_timeline(schedule, costs, ranks=ranks, microbatches=microbatches, split_backward=split)


@pytest.mark.parametrize("microbatches", [8, 16])
@pytest.mark.parametrize(
    ("schedule", "per_rank"), [("gpipe", 1), ("1f1b", 1), ("looped_bfs", 2), ("interleaved_1f1b", 2)]
)
def test_ranks_wait_as_narayanan_and_others_2021_count(schedule: str, per_rank: int, microbatches: int) -> None:
    expected = 3 / (per_rank * microbatches + 3)
    assert played(schedule, microbatches=microbatches).bubble == pytest.approx(expected)


@pytest.mark.parametrize(("microbatches", "bubble"), [(8, 0.059), (16, 0.030)])
@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv"])
def test_a_split_backward_fills_most_of_it_and_only_if_it_is_split(
    schedule: str, microbatches: int, bubble: float
) -> None:
    assert played(schedule, microbatches=microbatches).bubble == pytest.approx(bubble, abs=0.002)
    assert played(schedule, microbatches=microbatches, split=False).bubble > 2 * bubble


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (2, 6), (4, 8)])
def test_every_stage_computes_every_microbatch_once_and_nothing_before_what_it_needs(
    schedule: str, ranks: int, microbatches: int
) -> None:
    timeline = played(schedule, ranks=ranks, microbatches=microbatches)
    spans = {("B" if span.work == "I" else span.work, span.stage, span.microbatch): span for span in timeline.spans}
    assert len(spans) == len(timeline.spans)
    for stage in range(timeline.stages):
        for microbatch in range(microbatches):
            forward, backward = spans["F", stage, microbatch], spans["B", stage, microbatch]
            assert forward.end <= backward.start
            if stage:
                assert spans["F", stage - 1, microbatch].end <= forward.start
                assert backward.end <= spans["B", stage - 1, microbatch].start
    for rank in range(ranks):
        own = sorted((span.start, span.end) for span in timeline.spans if span.rank == rank)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(own))


@pytest.mark.parametrize(("schedule", "live"), [("gpipe", [8, 8, 8, 8]), ("1f1b", [4, 3, 2, 1])])
def test_a_rank_holds_as_many_microbatches_as_its_schedule_promises(schedule: str, live: list[int]) -> None:
    timeline = played(schedule)
    assert [timeline.live(rank) for rank in range(4)] == live


def test_the_slowest_stage_sets_the_pace() -> None:
    slow = plan_timeline("gpipe", [1.0, 3.0], ranks=2, microbatches=4)
    assert slow.end == pytest.approx(1.0 + 4 * 3.0 + 4 * 6.0 + 2.0)


def test_the_order_of_a_rank_with_one_stage_is_the_one_that_torch_runs() -> None:
    assert order_of(SCHEDULES["1f1b"], 2, 2, 3)[0] == [
        *[("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("F", 0, 2)],
        *[("B", 0, 1), ("B", 0, 2)],
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_picture_has_a_box_for_each_piece_of_work(schedule: str) -> None:
    timeline = played(schedule, ranks=2, microbatches=4, split=False)
    root = ElementTree.fromstring(draw(timeline))
    told = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert re.fullmatch(rf"{schedule}: \d stages on 2 ranks, 4 microbatches, bubble \d+\.\d%", told[0])
    assert len(told) == 1 + sum(span.end > span.start for span in timeline.spans)
    assert "stage 0, microbatch 0: forward" in told


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs as many microbatches as stages"):
        plan_timeline("1f1b", [1.0] * 4, ranks=4, microbatches=2)
