from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meshbolt.callbacks.pace import Position, Speed, epoch_of, format_metrics, position_in_fit

MANUAL = SimpleNamespace(automatic_optimization=False)


def trainer(**changes: Any) -> Any:
    """What `position_in_fit` reads of a Trainer; the Trainer itself has no setters for it."""
    values = {
        "num_training_batches": 10,
        "max_epochs": 3,
        "max_steps": -1,
        "accumulate_grad_batches": 1,
        "current_epoch": 1,
        "global_step": 12,
        "lightning_module": SimpleNamespace(automatic_optimization=True),
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Position("step", 12, 30)),
        ({"accumulate_grad_batches": 2}, Position("batch", 12, 30)),
        ({"lightning_module": MANUAL}, Position("batch", 12, 30)),
        ({"lightning_module": MANUAL, "max_steps": 20}, Position("update", 12, 20)),
        ({"max_steps": 20}, Position("step", 12, 20)),
        ({"max_steps": 20, "max_epochs": -1}, Position("step", 12, 20)),
        ({"max_steps": 20, "accumulate_grad_batches": 4}, Position("batch", 12, 30)),
        ({"max_steps": 20, "num_training_batches": float("inf"), "max_epochs": None}, Position("step", 12, 20)),
        ({"num_training_batches": float("inf")}, Position("step", 2, None)),
        ({"max_epochs": -1}, Position("step", 12, None)),
    ],
)
def test_progress_is_counted_in_what_ends_the_fit_first(changes: dict[str, Any], expected: Position) -> None:
    assert position_in_fit(trainer(**changes), batches_in_epoch=2) == expected


def test_the_time_left_follows_from_the_pace_since_the_start_of_this_run() -> None:
    resumed = Position("step", done=150, total=200)

    assert resumed.remaining_seconds(elapsed_seconds=10.0, done_at_start=100) == 10.0


@pytest.mark.parametrize("position", [Position("step", 5, None), Position("step", 0, 10)])
def test_the_time_left_is_unknown_without_an_end_or_a_step(position: Position) -> None:
    assert position.remaining_seconds(elapsed_seconds=3.0, done_at_start=0) is None


def test_speed_is_measured_between_batches_so_that_the_first_one_only_starts_the_clock() -> None:
    speed = Speed()
    speed.add(100.0, done=1, amount=4096)
    assert speed.texts(unit="step", amount_unit="tokens") == []

    speed.add(100.5, done=2, amount=4096)
    speed.add(101.0, done=3, amount=4096)
    assert speed.texts(unit="step", amount_unit="tokens") == ["8,192 tokens/s", "500.0 ms/step"]


def test_speed_forgets_what_is_long_past() -> None:
    speed = Speed()
    for second in range(100):
        speed.add(float(second), done=second, amount=0)
    for tenth in range(1, 201):
        speed.add(99 + tenth / 10, done=99 + tenth, amount=10)

    assert speed.texts(unit="step", amount_unit="samples") == ["100 samples/s", "100.0 ms/step"]


def test_speed_that_was_cleared_does_not_count_the_pause() -> None:
    speed = Speed()
    speed.add(0.0, done=1, amount=1)
    speed.clear()
    speed.add(60.0, done=2, amount=1)
    speed.add(61.0, done=3, amount=1)

    assert speed.texts(unit="step", amount_unit="samples") == ["1 samples/s", "1.0 s/step"]


def test_batches_without_a_step_give_no_time_per_step() -> None:
    speed = Speed()
    speed.add(0.0, done=0, amount=8)
    speed.add(1.0, done=0, amount=8)

    assert speed.texts(unit="step", amount_unit="samples") == ["8 samples/s"]


def test_metrics_are_written_with_as_many_digits_as_one_reads() -> None:
    metrics = {"loss": torch.tensor(2.34567), "rate": 3e-5, "zero": 0.0, "count": 7, "name": "x", "big": 123456.0}

    assert format_metrics(metrics) == ["loss 2.3457", "rate 3e-05", "zero 0.0000", "count 7", "name x", "big 1.23e+05"]


def test_a_name_cannot_break_a_line_or_the_terminal() -> None:
    assert format_metrics({"a\nb\x1b[31m": 1}) == ["ab[31m 1"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["epoch 2 of 3"]),
        ({"max_epochs": 1, "current_epoch": 0}, []),
        ({"max_epochs": -1, "current_epoch": 0}, []),
        ({"max_epochs": None, "current_epoch": 4}, ["epoch 5"]),
    ],
)
def test_the_epoch_is_told_where_there_are_several(changes: dict[str, Any], expected: list[str]) -> None:
    assert epoch_of(trainer(**changes)) == expected
