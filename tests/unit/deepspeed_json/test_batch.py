"""The three sizes of a batch."""

from __future__ import annotations

import pytest

from meshbolt.deepspeed import trainer_arguments
from meshbolt.deepspeed_json import Options, translate
from meshbolt.errors import ConfigError

KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def sizes(*values: int | str | None, ranks: int | None = 4) -> tuple[int | None, int | None, int | None]:
    config = {key: value for key, value in zip(KEYS, values, strict=True) if value is not None}
    batch = translate(config, Options(data_parallel_size=ranks)).batch
    return batch.total, batch.each, batch.steps


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((32, 4, 2), (32, 4, 2)),
        ((32, 4, None), (32, 4, 2)),
        ((32, None, 2), (32, 4, 2)),
        ((None, 4, 2), (32, 4, 2)),
        ((32, None, None), (32, None, None)),
        ((None, 4, None), (None, 4, None)),
        ((None, None, 2), (None, None, 2)),
        ((None, None, None), (None, None, None)),
        (("auto", 4, "auto"), (None, 4, None)),
    ],
)
def test_sizes_follow_from_the_others_or_are_left_to_the_run(given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert sizes(*given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((30, 4, None), ["'train_batch_size' 30", "4 data-parallel ranks", "multiple of 16", "16 or 32"]),
        ((8, 4, None), ["'train_batch_size' 8", "Make 'train_batch_size' 16"]),
        ((33, None, None), ["33", "32 or 36"]),
        ((64, 4, 2), ["4 x 2 x 4 = 32, not 64"]),
        ((2, None, None), ["Make 'train_batch_size' 4"]),
        ((0, None, None), ["'train_batch_size' is 0", "1 or more"]),
        ((32, 2.0, None), ["2.0", "whole number"]),
        ((True, None, None), ["True"]),
    ],
)
def test_sizes_that_do_not_go_together_are_refused_with_their_numbers(given: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        sizes(*given)
    assert not [word for word in words if word not in str(error.value)], error.value


def test_accumulation_that_needs_the_ranks_asks_for_them() -> None:
    sizes_alone = {KEYS[0]: 32, KEYS[1]: 4}
    with pytest.raises(ConfigError, match=r"their quotient 8 .* give data_parallel_size=") as error:
        trainer_arguments(sizes_alone, show=False)
    assert "the DeepSpeed configuration: " in str(error.value)
    assert trainer_arguments(sizes_alone, show=False, data_parallel_size=4)["accumulate_grad_batches"] == 2
    with pytest.raises(ConfigError, match="data_parallel_size="):
        translate({**sizes_alone, "pipeline": {"stages": 2}})
    made = translate({**sizes_alone, "pipeline": {"stages": 2}}, Options(data_parallel_size=4))
    assert (made.settings["pipeline_parallel"].microbatches, made.accumulate, made.batch.each) == (2, 1, 8)
    with pytest.raises(ConfigError, match="no number of ranks fits"):
        sizes(33, 4, 2, ranks=None)


def test_without_accumulation_and_ranks_the_trainer_decides_and_is_checked() -> None:
    made = translate({KEYS[0]: 32, KEYS[1]: 4})
    assert made.accumulate is None
    assert made.receipt.of(KEYS[2]).why == "8 / data-parallel ranks, checked when a run begins"
    assert made.batch.each_on(2, steps=4) == 4
    with pytest.raises(ConfigError, match="4 x 2 x 2 = 16, not 32"):
        made.batch.each_on(2, steps=2)
    with pytest.raises(ConfigError, match="33 is no multiple of 4"):
        translate({KEYS[0]: 33, KEYS[1]: 4})


def test_a_loader_has_the_batch_that_a_run_leaves_it() -> None:
    batch = translate({"train_batch_size": 32}).batch
    assert batch.each_on(4, steps=1) == 8
    assert batch.each_on(2, steps=4) == 4
    with pytest.raises(ConfigError, match="3 data-parallel ranks"):
        batch.each_on(3, steps=1)
