"""If these fail, the line about offloading at the end of a run says something else than was measured."""

from __future__ import annotations

from typing import Any

import pytest

from meshbolt.callbacks import OffloadMonitor
from meshbolt.callbacks.offload import summary
from meshbolt.errors import ConfigError
from meshbolt.offload.traffic import Moved, OffloadTraffic, Ways

GIB = 2**30


def test_a_line_says_what_moved_how_fast_and_how_much_was_hidden() -> None:
    moved = OffloadTraffic(
        state=Ways(read=Moved(4 * GIB, 5 * GIB, 2.5), to_host=Moved(GIB, GIB, 0.5)),
        updated=Moved(4 * GIB, 4 * GIB, 0.8),
        busy_seconds=4.0,
        step_wait_seconds=0.5,
        forward_wait_seconds=0.5,
    )
    assert summary(moved, 10) == (
        "offload: in 10 steps 1.0 GiB copied to the host at 2.0 GiB/s, 4.0 GiB read from files at 2.0 GiB/s, 4.0 GiB of state "
        "updated at 5.0 GiB/s; 75% of 4.0 s of updates was hidden, 1.0 s were waited for"
    )


def test_what_has_no_speed_has_none_in_the_line() -> None:
    assert summary(OffloadTraffic(), 1) == "offload: in 1 step 0 B of state updated"


@pytest.mark.parametrize("steps", [-1, True, (1,), (3, 2), (-1, 2), "1", (1, 2, 3), 1.5])
def test_steps_of_a_trace_that_are_none_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigError, match=r"OffloadMonitor\(trace_steps="):
        OffloadMonitor(trace_steps=steps)


@pytest.mark.parametrize("steps", [None, 0, (0, 3), [1, 1]])
def test_others_are_taken(steps: Any) -> None:
    OffloadMonitor(trace_steps=steps)
