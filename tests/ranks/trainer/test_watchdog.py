"""A rank that sleeps, dies or skips a collective is named by every rank within its deadline, and the run ends."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, trainer
from tests.rows import full
from torch import Tensor

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.callbacks import Watchdog, watchdog
from meshbolt.errors import ConfigError, RankError, StuckError
from meshbolt.monitoring import heartbeats
from meshbolt.testing import RankFailure, run_ranks

pytestmark = [
    *ADVICE,
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]

TIMEOUT_SECONDS, PAUSE_SECONDS = 1.0, 6.0
# Beyond the deadline: to collect, to judge, and to end.
SLACK_SECONDS = 5.0
LATE = 1
FOR_EVER = 100


def sleep(seconds: float = FOR_EVER) -> None:
    time.sleep(seconds)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_in_code_that_signals_do_not_end() -> None:
    """Lock a mutex of C twice."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def hold_pythons_lock() -> None:
    """Wait in C for 8 seconds, signals or not, without letting other threads run Python."""
    mutex, until = ctypes.create_string_buffer(64), (ctypes.c_long * 2)(int(time.time()) + 8, 0)
    ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    ctypes.PyDLL(None).pthread_mutex_timedlock(mutex, until)


def lock_held() -> tuple[str, str, float]:
    heartbeats.ANSWER_SECONDS = 3.0
    return late("step", hold_pythons_lock)


class Late(Regressor):
    """Does something else in a batch, on one rank: in the second epoch, whose first batch may take longer."""

    def __init__(self, place: str, do: Callable[[], None]) -> None:
        super().__init__()
        self.place, self.do = place, do
        self.begun = 0.0

    def at(self, place: str, index: int) -> None:
        if place == self.place and (self.current_epoch, index) == (1, 1):
            self.begun = time.monotonic()
            if dist.get_rank() == LATE:
                self.do()

    def on_train_batch_start(self, _batch: Any, index: int) -> None:
        self.at("hook", index)

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.at("step", index)
        return super().training_step(batch, index)

    def on_train_batch_end(self, _outputs: Any, _batch: Any, index: int) -> None:
        self.at("end", index - 1 if self.place == "end" else index)


def fit(module: Late, strategy: Any = "zero2", *callbacks: pl.Callback) -> tuple[str, str, float]:
    """Train, and return the type and the words of the error, and how long it took from where the rank was late."""
    owner = trainer(strategy, callbacks=[Watchdog(TIMEOUT_SECONDS, pause_seconds=PAUSE_SECONDS), *callbacks])
    try:
        owner.fit(module, batches(), batches())
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - module.begun
    return "", "", 0.0


def late(place: str, do: Callable[[], None], strategy: Any = "zero2") -> tuple[str, str, float]:
    return fit(Late(place, do), strategy)


@pytest.mark.parametrize(
    ("place", "ranks", "strategy"),
    [
        ("step", 2, "zero2"),
        full("step", 4, "zero3"),
        full("hook", 2, "zero1"),
        full("end", 2, "zero0"),
        full("step", 2, MeshStrategy(zero=0, pipeline_parallel=PipelineParallel(2, microbatches=3))),
    ],
    ids=["in-a-step", "of-four", "in-a-hook", "after-a-step", "in-a-pipeline"],
)
def test_a_rank_that_sleeps_is_named_by_all(place: str, ranks: int, strategy: Any, capfd: Any) -> None:
    results = run_ranks(late, ranks, place, sleep, strategy)
    for kind, words, seconds in results:
        assert (kind, words) == (StuckError.__name__, results[0][1])
        assert seconds < TIMEOUT_SECONDS + SLACK_SECONDS
        assert re.search(rf"rank {LATE} \(.*\) has not ", words)
        assert f"{Path(__file__).name}:" in words
        assert "time.sleep(seconds)" in words
    printed = capfd.readouterr().out
    assert printed.count("meshbolt watchdog: ") == 1
    assert all(f"  rank {rank} (" in printed for rank in range(ranks))
    assert "stacks of rank" in printed
    assert re.search(r"  (waits in|last collective:) all_\w+ \(number \d+ of ", printed.replace("; ", "  "))


class Skips(Late):
    """Reduces something in each batch, except on one rank in one of them."""

    def setup(self, stage: str) -> None:
        self.group = dist.new_group()

    def training_step(self, batch: Any, index: int) -> Tensor:
        if (self.current_epoch, index) != (1, 1) or dist.get_rank() != LATE:
            self.begun = time.monotonic()
            dist.all_reduce(torch.zeros(1), group=self.group)
        return Regressor.training_step(self, batch, index)


def skip() -> tuple[str, str, float]:
    return fit(Skips("nowhere", sleep))


@pytest.mark.parametrize("ranks", [full(2), full(3)])
def test_a_collective_that_a_rank_skips_is_named_with_the_rank(ranks: int) -> None:
    for kind, words, seconds in run_ranks(skip, ranks):
        assert (kind, seconds < TIMEOUT_SECONDS + SLACK_SECONDS) == (StuckError.__name__, True)
        assert "one was skipped" in words
        assert re.search(r"rank 0 in all_reduce \(number 6 of group \d+\)|rank 0 in all_reduce \(number \d+", words)
        assert f"rank {LATE} in all_gather" in words
        assert "dist.all_reduce(torch.zeros(1), group=self.group)" in words
        assert ("it seems by rank 1:" in words) == (ranks == 3)


@pytest.mark.full
def test_a_rank_that_dies_is_named_by_the_others(capfd: Any) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(late, 3, "step", die)
    dead, *_ = (outcome for outcome in failure.value.outcomes if outcome.rank == LATE)
    assert dead.kind == "died"
    for outcome in failure.value.outcomes:
        if outcome.rank != LATE:
            _, words, seconds = outcome.value
            assert re.search(rf"rank {LATE} \(.*, process \d+\) is gone, and was last seen in", words)
            assert seconds < SLACK_SECONDS


@pytest.mark.full
def test_a_rank_that_holds_pythons_lock_is_named_with_its_stacks(capfd: Any) -> None:
    (_, words, seconds), (kind, _, _) = run_ranks(lock_held, 2)
    assert seconds < TIMEOUT_SECONDS + SLACK_SECONDS + 3
    assert "rank 1 does not answer, as it holds Python's lock" in words
    assert "in hold_pythons_lock" in words
    # As soon as it has let go: told by its watchdog, or by a connection that another rank has ended.
    assert kind in (StuckError.__name__, RankError.__name__)


def stuck_in_c() -> tuple[str, str, float]:
    watchdog.LEAVE_SECONDS = 1.0
    return late("step", wait_in_code_that_signals_do_not_end)


@pytest.mark.full
def test_a_process_that_cannot_be_woken_is_ended(capfd: Any) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(stuck_in_c, 2)
    other, ended = failure.value.outcomes
    assert other.value[0] == StuckError.__name__
    assert (ended.kind, ended.exit_code) == ("died", 1)
    assert "cannot be woken: its process is ended" in capfd.readouterr().out


class SlowPlaces(Late):
    """Takes longer than a batch may, everywhere where a run does more than a batch."""

    def pause(self) -> None:
        time.sleep(2.5 * TIMEOUT_SECONDS)

    def training_step(self, batch: Any, index: int) -> Tensor:
        if (self.current_epoch, index) == (0, 0):
            self.pause()  # as a step that compiles does
        return Regressor.training_step(self, batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        if index == 0 and not self.trainer.sanity_checking:
            self.pause()
        super().validation_step(batch, index)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.pause()

    def on_validation_epoch_end(self) -> None:
        if self.current_epoch == 1:
            self.pause()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.pause()


def slow_places(folder: str) -> tuple[str, str, float]:
    return fit(SlowPlaces("nowhere", sleep), "zero2", ModelCheckpoint(folder, every_n_train_steps=5))


@pytest.mark.full
def test_what_is_more_than_a_batch_may_take_longer(tmp_path: Path) -> None:
    assert run_ranks(slow_places, 2, str(tmp_path)) == [("", "", 0.0)] * 2


def fine_runs() -> list[Any]:
    watch = Watchdog(TIMEOUT_SECONDS, pause_seconds=PAUSE_SECONDS)
    owner = trainer(callbacks=[watch], max_epochs=1)
    owner.fit(Regressor(), batches(), batches())
    owner.validate(Regressor(), batches(), verbose=False)
    owner.predict(Regressor(), batches())
    return [signal.getsignal(signal.SIGURG) == signal.SIG_DFL, watch._beats is None]


def test_runs_one_after_another_end_without_a_trace() -> None:
    assert run_ranks(fine_runs, 2) == [[True, True]] * 2


def alone() -> tuple[str, str, float]:
    if dist.is_initialized():
        dist.destroy_process_group()
    module = Late("step", sleep)
    module.at = lambda place, index: time.sleep(FOR_EVER) if index == 1 and module.current_epoch == 1 else None  # type: ignore[method-assign]
    module.begun = time.monotonic()
    owner = trainer("auto", callbacks=[Watchdog(TIMEOUT_SECONDS, pause_seconds=PAUSE_SECONDS)])
    try:
        owner.fit(module, batches())
    except StuckError as error:
        return "", str(error), time.monotonic() - module.begun
    return "fine", "", 0.0


@pytest.mark.full
def test_a_single_process_is_watched_too() -> None:
    ((kind, words, seconds),) = run_ranks(alone, 1)
    assert (kind, seconds < TIMEOUT_SECONDS + SLACK_SECONDS) == ("", True)
    assert "time.sleep(FOR_EVER)" in words


@pytest.mark.parametrize("times", [{"timeout_seconds": 0}, {"timeout_seconds": 10, "pause_seconds": 5}])
def test_times_that_make_no_sense_are_refused(times: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="pause not shorter"):
        Watchdog(**times)


def two_of_them() -> None:
    trainer(callbacks=[Watchdog(), Watchdog()]).fit(Regressor(), batches())


def test_two_of_them_are_refused() -> None:
    with pytest.raises(RankFailure, match="several callbacks of Watchdog"):
        run_ranks(two_of_them, 2)
