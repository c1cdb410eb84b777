"""Rates of the schedules: against values that DeepSpeed's schedules gave, and against DeepSpeed where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from tests.rows import full

from meshbolt.deepspeed_json.schedules import SCHEDULES
from meshbolt.errors import CheckpointError

CASES: list[tuple[str, dict[str, Any]]] = [
    ("WarmupLR", {"warmup_num_steps": 5}),
    ("WarmupLR", {"warmup_num_steps": 1, "warmup_max_lr": [0.1, 0.2], "warmup_min_lr": [0.01, 0.02]}),
    ("WarmupLR", {"warmup_num_steps": 7, "warmup_max_lr": 0.1, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"total_num_steps": 12, "warmup_num_steps": 4, "warmup_max_lr": 0.1, "warmup_min_lr": 0.01}),
    ("WarmupDecayLR", {"total_num_steps": 3, "warmup_num_steps": 5, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 12, "warmup_num_steps": 4, "warmup_min_ratio": 0.1}),
    ("WarmupCosineLR", {"total_num_steps": 4, "warmup_num_steps": 4, "warmup_type": "linear", "cos_min_ratio": 0.2}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4}),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.01,
            "cycle_max_lr": 0.1,
            "cycle_first_step_size": 5,
            "cycle_second_step_size": 3,
            "decay_step_size": 2,
            "decay_lr_rate": 0.5,
            "decay_mom_rate": 0.1,
            "cycle_first_stair_count": 2,
            "cycle_min_mom": 0.7,
        },
    ),
    ("LRRangeTest", {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 3}),
    ("LRRangeTest", {"lr_range_test_step_size": 3, "lr_range_test_step_rate": 0.5, "lr_range_test_staircase": True}),
]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.3, 0.5)]
    return torch.optim.AdamW(groups)


def course(make: Any, arguments: dict[str, Any], steps: int = 20) -> list[Any]:
    """Return rates and betas before each of a number of steps."""
    own = optimizer()
    schedule, seen = make(own, **arguments), []
    for _ in range(steps):
        seen += [value for group in own.param_groups for value in (group["lr"], *group["betas"])]
        own.step()
        schedule.step()
    return seen


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("case", [full(case, id=name) for case, name in zip(CASES, IDS, strict=True)])
def test_rates_are_those_of_deepspeed(case: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    name, arguments = case
    theirs = getattr(importlib.import_module("deepspeed.runtime.lr_schedules"), name)
    assert course(SCHEDULES[name], arguments) == pytest.approx(course(theirs, arguments), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (
            "WarmupLR",
            {"warmup_num_steps": 4, "warmup_max_lr": 0.4, "warmup_type": "linear"},
            [0, 0, 0.1, 0.2, 0.3, 0.4, 0.4],
        ),
        (
            "WarmupDecayLR",
            {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_max_lr": 0.4, "warmup_type": "linear"},
            [0, 0, 0.2, 0.4, 0.3, 0.2, 0.1, 0],
        ),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 0.4, "cycle_first_step_size": 2}, [0, 0.2, 0.4, 0.2, 0, 0]),
        ("LRRangeTest", {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2}, [0.1, 0.15, 0.2, 0.25]),
    ],
)
def test_rates_begin_one_before_the_schedule(name: str, arguments: dict[str, Any], expected: list[float]) -> None:
    seen = course(SCHEDULES[name], arguments, steps=len(expected))
    assert seen[::6] == pytest.approx(expected)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_schedule_that_is_resumed_goes_on_where_it_was(case: tuple[str, dict[str, Any]]) -> None:
    name, arguments = case
    whole = course(SCHEDULES[name], arguments, steps=9)
    own = optimizer()
    first = SCHEDULES[name](own, **arguments)
    for _ in range(4):
        own.step()
        first.step()
    again = optimizer()
    second = SCHEDULES[name](again, **arguments)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(own.state_dict())
    for _ in range(4):
        again.step()
        second.step()
    assert [value for group in again.param_groups for value in (group["lr"], *group["betas"])] == whole[-6:]


def test_a_schedule_takes_its_own_state_and_no_other() -> None:
    own = optimizer()
    states = {
        name: SCHEDULES[name](own, **arguments).state_dict()
        for name, arguments in CASES
        if name in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
    }
    states["StepLR"] = torch.optim.lr_scheduler.StepLR(own, 2).state_dict()
    for name, arguments in CASES[:1] + CASES[3:4]:
        for written_by, state in states.items():
            schedule = SCHEDULES[name](optimizer(), **arguments)
            before = schedule.state_dict()
            if name == written_by:
                schedule.load_state_dict({**state, "_new_in_torch": 1})
                continue
            with pytest.raises(CheckpointError, match=f"another learning rate schedule than {name}.*differ in"):
                schedule.load_state_dict(state)
            assert schedule.state_dict() == before


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_schedule_that_is_told_its_position_has_the_rates_of_as_many_steps(case: tuple[str, dict[str, Any]]) -> None:
    name, arguments = case
    told, stepped = optimizer(), optimizer()
    jumping, walking = SCHEDULES[name](told, **arguments), SCHEDULES[name](stepped, **arguments)
    assert jumping.last_batch_iteration == -1
    for _ in range(6):
        walking.step()

    jumping.step(5)

    assert (jumping.last_batch_iteration, jumping.get_last_lr()) == (5, walking.get_last_lr())
    assert told.param_groups[0]["betas"] == stepped.param_groups[0]["betas"]
