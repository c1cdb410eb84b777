"""The setting of pipelines: what it resolves to, and what is refused with its values and a remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from meshbolt.errors import ConfigError
from meshbolt.pipeline import SCHEDULES, PipelineParallel
from meshbolt.pipeline.schedule import find_schedule, order_of, schedule_for


def test_lists_and_tuples_are_the_same_setting() -> None:
    values: dict[str, Any] = {"size": 3, "blocks": ["encoder", "decoder"], "split": [2, 3, 1], "replicate": ["embed"]}
    listed = PipelineParallel(**values)
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    assert listed == PipelineParallel(**frozen)
    assert hash(listed) == hash(PipelineParallel(**frozen))
    assert PipelineParallel(**dataclasses.asdict(listed)) == listed
    assert PipelineParallel(2, cuts="layers.4") == PipelineParallel(2, cuts=["layers.4"])


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        (PipelineParallel(), 1),
        (PipelineParallel(4), 4),
        (PipelineParallel(4, schedule="gpipe"), 4),
        (PipelineParallel(4, schedule="interleaved_1f1b"), 8),
        (PipelineParallel(2, schedule="looped_bfs", stages_per_rank=3), 6),
        (PipelineParallel(4, schedule="zbv"), 8),
        (PipelineParallel(4, schedule="dualpipev", stages_per_rank=2), 8),
    ],
)
def test_the_schedule_says_how_many_stages_a_rank_has(setting: PipelineParallel, stages: int) -> None:
    assert setting.stages == stages
    assert setting.resolved_stages_per_rank * setting.size == stages


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_large_enough_batch_gets_a_number_that_its_schedule_takes(schedule: str, size: int) -> None:
    setting = PipelineParallel(size, schedule=schedule)
    for samples in range(setting.stages, 40):
        count = setting.microbatches_of(samples)
        assert count <= min(samples, 2 * size)
        find_schedule(schedule, stages=setting.stages, ranks=size, microbatches=count)
        larger = [each for each in range(count + 1, 2 * size + 1) if samples % each == 0]
        assert not any(setting.order.allows(each, stages=setting.stages, ranks=size) for each in larger)


@pytest.mark.parametrize("schedule", [name for name, order in SCHEDULES.items() if not order.single])
@pytest.mark.parametrize("size", [2, 3])
def test_torch_takes_the_numbers_that_are_allowed_and_no_others(schedule: str, size: int) -> None:
    order = SCHEDULES[schedule]
    for count in range(1, 12):
        if order.allows(count, stages=2 * size, ranks=size):
            assert len(order_of(order, 2 * size, size, count)) == size
        else:
            with pytest.raises(ValueError, match=r"[Mm]icrobatches"):
                order_of(order, 2 * size, size, count)
            with pytest.raises(ConfigError, match=rf"microbatches.*\b{count}\b"):
                find_schedule(schedule, stages=2 * size, ranks=size, microbatches=count)


@pytest.mark.parametrize(
    ("setting", "samples", "count"),
    [
        (PipelineParallel(), 5, 1),
        (PipelineParallel(2), 8, 4),
        (PipelineParallel(2), 6, 3),
        (PipelineParallel(2), 2, 2),
        (PipelineParallel(2), 7, 4),  # no divisor that 1f1b takes: microbatches of 2, 2, 2 and 1
        (PipelineParallel(2, schedule="gpipe"), 7, 1),
        (PipelineParallel(3, schedule="interleaved_1f1b"), 8, 4),
        (PipelineParallel(2, microbatches=3), 7, 3),
        (PipelineParallel(2, microbatches=3, schedule="zbv"), 3, 3),
    ],
)
def test_a_batch_is_divided_into_as_many_microbatches(setting: PipelineParallel, samples: int, count: int) -> None:
    assert setting.microbatches_of(samples) == count


@pytest.mark.parametrize(
    ("setting", "samples", "message"),
    [
        (
            PipelineParallel(4),
            3,
            r"4 stages needs 4 microbatches or more.* 3 samples .*4 samples or more.*schedule='gpipe'",
        ),
        (PipelineParallel(2, schedule="dualpipev"), 3, r"'dualpipev' with 4 stages needs 4 .* 3 samples"),
        (
            PipelineParallel(2, microbatches=8),
            5,
            r"microbatches=8\).* one of 5 samples.*8 samples or more.*drop_last=True",
        ),
        (PipelineParallel(2, schedule="gpipe"), 0, r"needs 1 microbatches or more, and a batch of 0 samples"),
    ],
)
def test_a_batch_that_is_too_small_is_refused(setting: PipelineParallel, samples: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setting.microbatches_of(samples)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, r"pipeline_parallel=0 is not a number of ranks. Use 1 or more"),
        ({"size": True}, r"pipeline_parallel=True is not a number"),
        ({"size": "2"}, r"pipeline_parallel='2' is not a number"),
        ({"schedule": "1f1"}, r"schedule='1f1'\): there is no such schedule \(did you mean '1f1b'\?"),
        ({"schedule": None}, r"schedule=None\): there is no such schedule"),
        ({"microbatches": 0}, r"microbatches=0\) is not a number. Use 1 or more, or 'auto'"),
        ({"microbatches": "4"}, r"microbatches='4'\) is not a number"),
        ({"stages_per_rank": -1}, r"stages_per_rank=-1\) is not a number"),
        ({"cuts": []}, r"cuts=\[\]\) names no modules"),
        ({"cuts": [1]}, r"cuts=\[1\]\) is to name modules, as a list of strings"),
        ({"cuts": ""}, r"cuts=''\) is to name modules"),
        ({"cuts": ["a", "a"], "size": 3}, r"cuts=\['a', 'a'\]\) names 'a' twice"),
        ({"blocks": {"a": 1}}, r"blocks=\{'a': 1\}\) is to name lists of modules"),
        ({"replicate": [None]}, r"replicate=\[None\]\) is to name modules"),
        ({"replicate": None}, r"replicate=None\) is to name modules"),
        ({"split": [3, 0]}, r"split=\(3, 0\)\) is to say how many blocks each stage has, such as \[7, 5\]"),
        ({"split": "even"}, r"split='even'\) is to say how many blocks"),
        ({"split": 4}, r"split=4\) is to say how many blocks"),
        ({"example_batch": "data.batch"}, r"example_batch='data.batch'\) is not the name of a method or attribute"),
        ({"example_batch": 3}, r"example_batch=3\) is not the name"),
    ],
)
def test_a_value_that_means_nothing_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PipelineParallel(**{"size": 2, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"cuts": ["a"], "blocks": "layers"},
            r"cuts=\['a'\]\) says where every stage begins.* Give cuts, or blocks and split",
        ),
        ({"cuts": ["a"], "split": [1, 1]}, r"leaves nothing for blocks and split to say"),
        (
            {"cuts": ["a", "b"]},
            r"cuts=\['a', 'b'\]\) begins 3 stages .* 2 stages \(2 ranks with 1 each\). Name 1 modules\.$",
        ),
        (
            {"cuts": list("abcde"), "schedule": "interleaved_1f1b"},
            r"begins 6 stages .* 4 stages \(2 ranks with 2 each\). Name 3 modules, or use stages_per_rank=3",
        ),
        (
            {"split": [1, 2, 3]},
            r"split=\[1, 2, 3\]\) is for 3 stages, and there are 2 stages .* Give 2 numbers of blocks\.$",
        ),
        ({"schedule": "1f1b", "stages_per_rank": 2}, r"has one stage a rank.* or use schedule='interleaved_1f1b'"),
        ({"schedule": "zbv", "stages_per_rank": 3}, r"schedule='zbv', stages_per_rank=3\).* has two stages a rank\."),
        ({"schedule": "looped_bfs", "stages_per_rank": 1}, r"two stages a rank or more.* or use schedule='1f1b'"),
        ({"microbatches": 1}, r"needs as many microbatches as stages, and has 1. Use microbatches=2 or more"),
        (
            {"microbatches": 5, "schedule": "interleaved_1f1b"},
            r"5 cannot be divided into 2 equal rounds. Use microbatches=4 or 6, or schedule='looped_bfs'",
        ),
        *(
            ({"size": 1, field: value}, r"size=1\) keeps the module on one rank.* Give a size of 2 or more")
            for field, value in (
                ("microbatches", 4),
                ("schedule", "gpipe"),
                ("cuts", ["a"]),
                ("blocks", ["a"]),
                ("split", [3]),
                ("stages_per_rank", 1),
                ("replicate", ["a"]),
                ("example_batch", "batch"),
            )
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PipelineParallel(**{"size": 2, **values})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_for_any_number_of_microbatches_there_is_an_order_of_the_same_stages(schedule: str) -> None:
    setting = PipelineParallel(2, schedule=schedule)
    for count in range(1, 10):
        found = schedule_for(schedule, stages=setting.stages, ranks=2, microbatches=count)
        assert found.allows(count, stages=setting.stages, ranks=2)
        for rank in range(2):
            per_rank = setting.resolved_stages_per_rank
            expected = setting.order.stages_of(rank, ranks=2, stages_per_rank=per_rank)
            assert found.stages_of(rank, ranks=2, stages_per_rank=per_rank) == expected
