"""`run_ranks` on ranks that die, hang and desert each other: each ends in time, and the test learns how."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from meshbolt.testing import Outcome, RankFailure, run_ranks, run_ranks_expecting

# Of the tests' own tools: `make test` stands on them in every test.
pytestmark = pytest.mark.full


def outcomes_of(fn: Callable[[], object], n: int = 2, *, timeout: float = 20) -> tuple[tuple[Outcome, ...], float]:
    began = time.monotonic()
    with pytest.raises(RankFailure) as failure:
        run_ranks(fn, n, timeout=timeout)
    return failure.value.outcomes, time.monotonic() - began


def is_alive(pid: int) -> bool:
    # A dead process that nobody has asked about stays listed as a zombie.
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def ends_within(pid: int, *, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_alive(pid)


def test_an_error_on_one_rank_wakes_those_that_wait_for_it():
    def fail_alone() -> None:
        if dist.get_rank() == 1:
            raise ValueError("only here")
        dist.barrier()

    (waiting, failing), seconds = outcomes_of(fail_alone)
    assert failing.raised(ValueError)
    assert waiting.raised(RuntimeError)
    assert seconds < 10


def test_a_rank_that_waits_for_nothing_is_stopped_soon_after_another_failed():
    def fail_alone() -> None:
        if dist.get_rank() == 1:
            raise ValueError("only here")
        time.sleep(60)

    (sleeping, failing), seconds = outcomes_of(fail_alone)
    assert failing.kind == "raised"
    assert sleeping.kind == "stopped"
    assert "in fail_alone" in sleeping.traceback
    assert seconds < 15


@pytest.mark.parametrize(
    ("deed", "exit_code"),
    [
        (os.abort, -signal.SIGABRT),
        (lambda: os._exit(7), 7),
        (lambda: os._exit(0), 0),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
        (lambda: ctypes.string_at(0), -signal.SIGSEGV),
    ],
    ids=["abort", "exit-7", "exit-0", "kill", "segfault"],
)
def test_a_rank_that_dies_is_reported_with_its_exit_code(deed: Callable[[], None], exit_code: int):
    def die() -> None:
        if dist.get_rank() == 1:
            print("my last words", flush=True)
            deed()
        dist.barrier()

    (waiting, dead), seconds = outcomes_of(die)
    assert (dead.kind, dead.exit_code) == ("died", exit_code)
    assert "my last words" in dead.output
    assert waiting.raised(RuntimeError)
    assert seconds < 10


def test_a_death_is_noticed_although_a_child_of_the_rank_lives_on_and_holds_its_pipe(tmp_path: Path):
    def fork_and_die() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            time.sleep(60)
        (tmp_path / "pid").write_text(str(child))
        os._exit(7)

    (dead,), seconds = outcomes_of(fork_and_die, 1)
    assert (dead.kind, dead.exit_code) == ("died", 7)
    assert seconds < 10
    assert ends_within(int((tmp_path / "pid").read_text()), seconds=5)


def test_a_message_of_the_wrong_size_ends_in_outcomes_although_gloo_aborts():
    def mismatch() -> None:
        dist.broadcast(torch.zeros(5 if dist.get_rank() else 1000), src=0)
        dist.barrier()

    outcomes, _ = outcomes_of(mismatch)
    assert {"died"} <= {outcome.kind for outcome in outcomes}
    assert any("gloo::EnforceNotMet" in outcome.output for outcome in outcomes)


def test_a_hang_ends_at_the_limit_with_the_stacks_of_every_thread():
    def wait_for_ever() -> None:
        threading.Event().wait()

    def hang() -> None:
        threading.Thread(target=wait_for_ever, daemon=True).start()
        time.sleep(60)

    outcomes, seconds = outcomes_of(hang, timeout=0.5)
    for outcome in outcomes:
        assert outcome.kind == "stuck"
        assert "in wait_for_ever" in outcome.traceback
        assert "in hang" in outcome.traceback
        assert "pytest" not in outcome.traceback
    assert seconds < 15


def test_a_hang_that_holds_the_interpreter_lock_still_gives_its_stacks():
    def spin() -> None:
        # PyDLL keeps the lock during the call: no Python code of this process runs again.
        ctypes.PyDLL(None).sleep(60)

    (outcome,), _ = outcomes_of(spin, 1, timeout=0.5)
    assert outcome.kind == "stuck"
    assert "in spin" in outcome.traceback


def test_a_collective_that_not_all_join_times_out():
    def desert() -> None:
        if dist.get_rank() == 0:
            dist.barrier()
        else:
            time.sleep(60)

    (waiting, sleeping), seconds = outcomes_of(desert, timeout=1)
    assert waiting.raised(RuntimeError)
    assert "Timed out" in waiting.message
    assert sleeping.kind == "stopped"
    assert seconds < 12


def test_a_rank_that_returns_early_does_not_keep_the_others_for_the_whole_timeout():
    def leave_early() -> None:
        if dist.get_rank() == 0:
            dist.barrier()

    (waiting, gone), seconds = outcomes_of(leave_early)
    assert gone.kind == "returned"
    assert waiting.raised(RuntimeError)
    assert seconds < 15


def test_errors_outside_exception_are_reported_like_any_other():
    def leave() -> None:
        sys.exit(3)

    def interrupt() -> None:
        raise KeyboardInterrupt

    run_ranks_expecting(leave, 2, error=SystemExit, match="3")
    run_ranks_expecting(interrupt, 2, error=KeyboardInterrupt)


def test_an_error_that_cannot_be_printed_is_a_death_with_the_reason_in_the_output():
    class MuteError(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError("no words")

    def fail() -> None:
        raise MuteError

    (outcome,), _ = outcomes_of(fail, 1)
    assert (outcome.kind, outcome.exit_code) == ("died", 1)
    assert "ZeroDivisionError: no words" in outcome.output


def test_a_value_that_cannot_be_rebuilt_is_an_error_that_says_so():
    def unloadable() -> object:
        return Unloadable()

    run_ranks_expecting(unloadable, 2, error=TypeError, match=r"cannot be rebuilt .*only in a rank")


class Unloadable:
    """Pickles well, and refuses to be built in the test's process."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return refuse, ("only in a rank",)


def refuse(reason: str) -> None:
    raise OSError(reason)


def test_what_a_killed_rank_has_started_is_killed_with_it(tmp_path: Path):
    def start_and_hang() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(60)

    outcomes_of(start_and_hang, 1, timeout=0.5)
    assert ends_within(int((tmp_path / "pid").read_text()), seconds=5)


def test_an_interrupted_call_leaves_no_rank_behind(tmp_path: Path):
    parent = os.getpid()

    def interrupt_the_parent() -> None:
        (tmp_path / str(os.getpid())).touch()
        dist.barrier()
        if dist.get_rank() == 0:
            os.kill(parent, signal.SIGUSR2)
        time.sleep(60)

    before = signal.signal(signal.SIGUSR2, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_ranks(interrupt_the_parent, 2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    ranks = [int(path.name) for path in tmp_path.iterdir()]
    assert len(ranks) == 2
    assert not any(is_alive(rank) for rank in ranks)


ORPHAN = """
import os, pathlib, sys, time
from meshbolt.testing import run_ranks

def sleep():
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    os.kill(os.getppid(), 9)
    time.sleep(60)

run_ranks(sleep, 1, timeout=0.5)
"""


def test_a_rank_whose_parent_was_killed_ends_itself(tmp_path: Path):
    command = [sys.executable, "-c", ORPHAN, str(tmp_path / "pid")]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    assert ends_within(int((tmp_path / "pid").read_text()), seconds=20)


def test_the_next_call_works_after_every_kind_of_failure():
    def hang() -> None:
        time.sleep(60)

    outcomes_of(os.abort)
    outcomes_of(hang, timeout=0.1)
    assert run_ranks(dist.get_rank, 2) == [0, 1]
