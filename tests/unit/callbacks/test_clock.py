from __future__ import annotations

import time

import pytest
import torch

from meshbolt.callbacks.clock import Phase, StepClock


def spend(clock: StepClock, phase: Phase, seconds: float) -> None:
    clock.begin(phase)
    time.sleep(seconds)


def test_phases_add_up_to_the_step_and_pauses_are_in_neither() -> None:
    clock = StepClock(torch.device("cpu"))
    spend(clock, "between", 0.01)
    spend(clock, "forward", 0.02)
    spend(clock, "backward", 0.03)
    spend(clock, "pause", 0.2)
    spend(clock, "forward", 0.02)
    clock.end_step(7, "note")
    (step,) = clock.read()

    assert (step.number, step.note, step.exposed) == (7, "note", None)
    assert step.seconds == pytest.approx(sum(step.phases.values()))
    assert step.phases.keys() == {"between", "forward", "backward"}
    assert 0.04 <= step.phases["forward"] < 0.1
    assert step.seconds < 0.2
    assert clock.read() == []


def test_the_next_step_begins_where_one_ends() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin("between")
    clock.end_step(1, None)
    time.sleep(0.02)
    assert clock.phase == "between"
    clock.end_step(2, None)
    _, second = clock.read()
    assert second.phases["between"] >= 0.02


def test_later_steps_can_be_left_for_later() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin("between")
    for number in range(1, 4):
        clock.end_step(number, None)
    assert [step.number for step in clock.read(last=2)] == [1, 2]
    assert clock.read(last=2) == []
    assert [step.number for step in clock.read()] == [3]


def test_waits_belong_to_the_phase_that_waited() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.watch()
    for phase in ("between", "forward", "pause", "backward", "optimizer"):
        clock.begin(phase)
        if phase != "backward":
            since = clock.waiting()
            time.sleep(0.01)
            clock.waited(since)
    clock.end_step(1, None)
    (step,) = clock.read()
    assert step.exposed is not None
    assert step.exposed.keys() == {"between", "forward", "optimizer"}
    assert all(0.01 <= seconds < 0.05 for seconds in step.exposed.values())


def test_waits_of_a_step_that_is_not_watched_are_not_noted() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin("forward")
    clock.waited(clock.waiting())
    clock.end_step(1, None)
    clock.watch()
    clock.end_step(2, None)
    first, second = clock.read()
    assert first.exposed is None
    assert second.exposed == {}


def test_what_validation_gets_before_it_says_so_is_a_pause_too() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin("between")
    spend(clock, "forward", 0.01)
    spend(clock, "between", 0.05)
    spend(clock, "fetch", 0.05)
    clock.pause()
    time.sleep(0.05)
    clock.begin("forward")
    clock.end_step(1, None)
    (step,) = clock.read()
    assert step.phases.keys() == {"between", "forward"}
    assert step.seconds < 0.05
