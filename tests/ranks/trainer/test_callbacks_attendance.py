"""The roll call after an exception: a group of all ranks, or none on any, and in short time."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from meshbolt.strategies.attendance import Attendance
from meshbolt.testing import run_ranks


def call(delays: list[float], steps: list[int]) -> tuple[float | None, float]:
    """Return what the ranks add up to over the new group, if there is one, and how long the call took."""
    rank = dist.get_rank()
    time.sleep(delays[rank])
    began = time.monotonic()
    group = Attendance(timeout=timedelta(seconds=5)).group(steps=steps[rank])
    seconds = time.monotonic() - began
    if group is None:
        return None, seconds
    total = torch.ones(())
    dist.all_reduce(total, group=group)
    return total.item(), seconds


def test_ranks_that_come_in_time_get_a_group_of_their_own() -> None:
    assert [total for total, _ in run_ranks(call, 3, [0.0, 0.2, 0.0], [7, 7, 7])] == [3, 3, 3]


# A tenth of the timeout, 0.5 s, is waited; a store that is a file looks once a second.
@pytest.mark.parametrize(("delays", "steps"), [([0.0, 0.0, 2.5], [7, 7, 7]), ([0.0, 0.0, 0.0], [7, 8, 7])], ids=str)
def test_where_a_rank_is_late_or_elsewhere_nobody_gets_a_group(delays: list[float], steps: list[int]) -> None:
    found = run_ranks(call, 3, delays, steps)

    assert [total for total, _ in found] == [None, None, None]
    assert max(seconds for _, seconds in found) < 2
