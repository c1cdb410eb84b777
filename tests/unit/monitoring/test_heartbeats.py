"""Heartbeats of ranks, here threads of one process that meet in a file."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from meshbolt.monitoring.heartbeats import Heartbeats
from meshbolt.monitoring.interrupt import Interrupt
from meshbolt.monitoring.stacks import current_stacks

FAST_SECONDS = 0.05


class Ranks:
    """Some ranks, and how each has ended."""

    def __init__(self, folder: Path, world: int) -> None:
        self.ends: dict[int, tuple[Any, str]] = {}
        self.beats = [
            Heartbeats(
                rank=rank,
                world=world,
                store=dist.FileStore(str(folder / "store"), world),  # type: ignore[attr-defined]
                key="test",
                silence_seconds=0.6,
                step=lambda: 3,
                arrival_seconds=30.0,
                end=lambda *how, rank=rank: self.ends.__setitem__(rank, how),
                interval_seconds=FAST_SECONDS,
            )
            for rank in range(world)
        ]

    def wait_for_ends(self, count: int, seconds: float = 10.0) -> None:
        until = time.monotonic() + seconds
        while len(self.ends) < count and time.monotonic() < until:
            time.sleep(FAST_SECONDS)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path, 3)
    yield made
    for each in made.beats:
        each.stop()


def test_all_end_with_one_verdict_when_one_is_late(ranks: Ranks) -> None:
    for rank, each in enumerate(ranks.beats):
        each.mark("a step", patience_seconds=60.0)
        if rank != 1:
            each.mark("a step", patience_seconds=60.0 if rank else 0.3)
        each.start()
    ranks.wait_for_ends(3)
    verdicts = [ranks.ends[rank][0] for rank in range(3)]
    assert [verdict.culprits for verdict in verdicts] == [(1,)] * 3
    texts = [ranks.ends[rank][1] for rank in range(3)]
    assert texts[1:] == ["", ""]
    assert texts[0].startswith("rank 0 has been in a step of step 3 for more than 300.0 ms.")
    assert "stacks of rank" in texts[0]
    assert "in test_all_end_with_one_verdict_when_one_is_late" in texts[0]


def test_a_rank_that_goes_on_while_others_answer_ends_nothing(ranks: Ranks) -> None:
    for each in ranks.beats[:2]:
        each.mark("a step", patience_seconds=0.2)
        each.start()
    time.sleep(0.4)  # the alarm is given, and the last rank has not answered
    for each in ranks.beats:
        each.mark("a step", patience_seconds=60.0)
    ranks.beats[2].start()
    time.sleep(0.5)
    assert ranks.ends == {}
    ranks.beats[0].mark("a step", patience_seconds=0.1)  # the next alarm counts
    ranks.wait_for_ends(3)
    assert len(ranks.ends) == 3


def test_a_rank_that_is_done_is_not_missed(ranks: Ranks) -> None:
    for each in ranks.beats:
        each.mark("a step", patience_seconds=60.0)
        each.start()
    time.sleep(0.3)
    ranks.beats[1].stop()
    time.sleep(1.0)
    assert ranks.ends == {}


def test_a_rank_that_falls_silent_is_named(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshbolt.monitoring.heartbeats.ANSWER_SECONDS", 0.5)
    for each in ranks.beats:
        each.mark("a step", patience_seconds=60.0)
    silent = ranks.beats[2]
    for each in ranks.beats[:2]:
        each.start()
    silent._tick()  # one sign of life
    ranks.wait_for_ends(2)
    assert {rank: end[0].culprits for rank, end in ranks.ends.items()} == {0: (2,), 1: (2,)}
    assert "rank 2 has given no sign of life for 600.0 ms." in ranks.ends[1][1]


def test_a_main_thread_that_sleeps_gets_the_error() -> None:
    before = signal.getsignal(signal.SIGURG)
    interrupt = Interrupt()
    threading.Timer(0.1, interrupt.raise_in_main, [LookupError("wake up")]).start()
    begin = time.monotonic()
    with pytest.raises(LookupError, match="wake up"):
        time.sleep(30)
    assert time.monotonic() - begin < 5
    assert interrupt.has_raised.is_set()
    assert Path(interrupt.stacks_file).exists()
    interrupt.remove()
    interrupt.remove()
    assert signal.getsignal(signal.SIGURG) == before
    assert not Path(interrupt.stacks_file).exists()


def test_a_signal_of_somebody_elses_does_nothing() -> None:
    interrupt = Interrupt()
    try:
        signal.raise_signal(signal.SIGURG)
    finally:
        interrupt.remove()


def test_stacks_begin_with_the_main_thread_and_say_where_it_is_in_the_users_code() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="waits here", daemon=True)
    thread.start()
    main, *others = current_stacks()
    release.set()
    thread.join()
    assert main.name == "MainThread"
    assert "test_heartbeats.py" in main.place or "stacks.py" in main.lines[-2]
    (waiting,) = (each for each in others if each.name == "waits here")
    assert any("threading.py" in line for line in waiting.lines)
    assert not waiting.waits
