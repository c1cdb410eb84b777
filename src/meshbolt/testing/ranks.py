"""Run a function on several ranks, each a process of its own, from inside a test.

    def sums_over_ranks():
        value = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(value)
        return value.item()

    def test_every_rank_sees_the_sum():
        assert run_ranks(sums_over_ranks, 2) == [1.0, 1.0]

The ranks are forked from the test process, which is warmed first, so that a test on two ranks takes some 0.06 s. They
meet over gloo. Whatever happens in them ends as an `Outcome` in the test: a value, a traceback, a death, or the Python
stacks of a rank that hung.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

from meshbolt.errors import ConfigError
from meshbolt.testing import worker
from meshbolt.testing.outcomes import Kind, Outcome, RankFailure, exit_words
from meshbolt.testing.values import dump, load
from meshbolt.testing.warm import quiet_fork, refuse_unsafe_fork, warm

Start = Literal["fork", "spawn"]
Result = TypeVar("Result")

# How much later than a collective the whole call gives up: a collective that times out shall tell its own story.
STARTUP_SECONDS: dict[str, float] = {"fork": 3.0, "spawn": 60.0}
# How long the other ranks may go on once one has failed.
GRACE_SECONDS = 3.0
# When a rank whose parent was killed ends itself, counted from the end of a call that nobody ended.
ORPHAN_SECONDS = 5.0
_TICK_SECONDS = 0.1
_PATIENCE_SECONDS = 1.0
_OUTPUT_TAIL_CHARACTERS = 4000


def run_ranks(
    fn: Callable[..., Result], n: int, *args: Any, timeout: float = 60, start: Start = "fork"
) -> list[Result]:
    """Call `fn(*args)` on `n` ranks and return what each returned, by rank.

    Every rank has the default process group (gloo) initialised, torchrun's environment variables set, torch held to one
    thread and the random generators at one seed. Results come back by value: plain Python values and tensors.

    Args:
        fn: The function; with `start="spawn"` one from the top level of an importable module.
        n: The number of ranks.
        args: Arguments of the function, the same on every rank.
        timeout: Seconds that a collective waits for its peers. The whole call is ended 3 s (with spawn 60 s) later.
        start: `fork` copies this process, which must have one thread and no GPU context; the ranks see no GPU. `spawn`
            begins with a fresh interpreter, takes seconds, and is for end-to-end tests.

    Raises:
        RankFailure: A rank raised, died or hung; the message has the traceback or the stacks of each.
        ConfigError: `n`, `timeout` or `start` make no sense.
        UnsupportedError: This process cannot be forked; the message says why.
    """
    outcomes = _outcomes(functools.partial(fn, *args), n, timeout=timeout, start=start)
    if any(one.kind != "returned" for one in outcomes):
        raise RankFailure(outcomes)
    return [one.value for one in outcomes]


def run_ranks_expecting(
    fn: Callable[..., Any],
    n: int,
    *args: Any,
    error: type[BaseException],
    match: str = "",
    timeout: float = 60,
    start: Start = "fork",
) -> list[str]:
    """Call `fn(*args)` on `n` ranks, check that *every* rank raises `error`, and return the messages, by rank.

    Args:
        fn: As for `run_ranks`.
        n: As for `run_ranks`.
        args: As for `run_ranks`.
        error: The type that every rank must raise; a subclass will do.
        match: A regular expression that each message must contain.
        timeout: As for `run_ranks`.
        start: As for `run_ranks`.

    Raises:
        RankFailure: A rank returned, raised something else, died or hung.
    """
    outcomes = _outcomes(functools.partial(fn, *args), n, timeout=timeout, start=start)
    unlike = [one.rank for one in outcomes if not (one.raised(error) and re.search(match, one.message))]
    if unlike:
        wanted = f"{error.__name__}{f' matching {match!r}' if match else ''}"
        raise RankFailure(outcomes, reason=f"every rank should raise {wanted}; ranks {unlike} did not")
    return [one.message for one in outcomes]


def _outcomes(job: Callable[[], Any], n: int, *, timeout: float, start: Start) -> list[Outcome]:
    if n < 1 or timeout <= 0 or start not in STARTUP_SECONDS:
        raise ConfigError(
            f"run_ranks(n={n}, timeout={timeout}, start={start!r}): "
            "it takes at least one rank, a positive timeout in seconds, and start 'fork' or 'spawn'."
        )
    if start == "fork":
        refuse_unsafe_fork()
        warm()
    with tempfile.TemporaryDirectory(prefix="meshbolt-ranks-") as folder:
        return _Call(job, n, Path(folder), timeout=timeout, start=start).run()


class _Call:
    """One call: its processes, and what is known of each."""

    def __init__(self, job: Callable[[], Any], n: int, folder: Path, *, timeout: float, start: Start) -> None:
        self.began = time.monotonic()
        self.limit_seconds = timeout + STARTUP_SECONDS[start]
        forked = start == "fork"
        self.context = multiprocessing.get_context("fork") if forked else multiprocessing.get_context("spawn")
        self.job = job if forked else dump(job)
        port = _free_port()
        self.ranks = [
            worker.Rank(
                rank=rank,
                world=n,
                folder=folder,
                port=port,
                timeout_seconds=timeout,
                limit_seconds=self.limit_seconds + ORPHAN_SECONDS,
                forked=forked,
                filters=list(warnings.filters),
            )
            for rank in range(n)
        ]
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        self.outcomes: dict[int, Outcome] = {}

    def run(self) -> list[Outcome]:
        """Start the ranks, see each to its end, and leave none behind."""
        try:
            with quiet_fork():
                for me in self.ranks:
                    self._start(me)
            while len(self.outcomes) < len(self.ranks) and time.monotonic() < self._deadline():
                self._listen()
            self._give_up_on_the_rest()
        finally:
            self._end_all()
            self._replay_output()
        return [self.outcomes[me.rank] for me in self.ranks]

    def _start(self, me: worker.Rank) -> None:
        ours, theirs = self.context.Pipe()
        self.connections.append(ours)
        # Not a daemon: a rank may start processes of its own, such as the workers of a DataLoader.
        process = self.context.Process(target=worker.main, args=(me, theirs, self.job), name=f"rank{me.rank}")
        process.start()
        self.processes.append(process)
        theirs.close()

    def _deadline(self) -> float:
        failures = [one.seconds for one in self.outcomes.values() if one.kind != "returned"]
        return self.began + min([self.limit_seconds, *(seconds + GRACE_SECONDS for seconds in failures)])

    def _listen(self) -> None:
        silent = [me.rank for me in self.ranks if me.rank not in self.outcomes]
        # The exit codes are asked for as well: a rank's own child can hold its pipe open after the rank has died.
        dead = [rank for rank in silent if self.processes[rank].exitcode is not None]
        ready = wait([self.connections[rank] for rank in silent], timeout=0 if dead else _TICK_SECONDS)
        for rank in silent:
            if self.connections[rank] in ready:
                self.outcomes[rank] = self._hear(rank)
            elif rank in dead:
                self.outcomes[rank] = self._died(rank)

    def _hear(self, rank: int) -> Outcome:
        try:
            kind, fields = self.connections[rank].recv()
        except (EOFError, OSError):
            self.processes[rank].join(_PATIENCE_SECONDS)
            return self._died(rank)
        if kind == "returned":
            kind, fields = _unpacked(fields["value"])
        return Outcome(rank=rank, kind=kind, seconds=self._seconds(), **fields)

    def _died(self, rank: int) -> Outcome:
        code = self.processes[rank].exitcode
        printed = _read(self.ranks[rank].output)[-_OUTPUT_TAIL_CHARACTERS:]
        return Outcome(
            rank=rank, kind="died", seconds=self._seconds(), message=exit_words(code), exit_code=code, output=printed
        )

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _give_up_on_the_rest(self) -> None:
        rest = [me for me in self.ranks if me.rank not in self.outcomes]
        failed = any(one.kind != "returned" for one in self.outcomes.values())
        kind: Kind = "stopped" if failed else "stuck"
        why = "since another rank had failed" if failed else f"at the limit of {self.limit_seconds:g} s, start included"
        for me in rest:
            _signal(self.processes[me.rank], signal.SIGUSR1)
        for me in rest:
            self.outcomes[me.rank] = Outcome(
                rank=me.rank, kind=kind, seconds=self._seconds(), message=f"killed {why}", traceback=_stacks(me.stacks)
            )

    def _end_all(self) -> None:
        reported = [rank for rank, one in self.outcomes.items() if one.kind in ("returned", "raised")]
        for rank in reported:
            with contextlib.suppress(OSError):  # it may have left by itself
                self.connections[rank].send_bytes(b"leave")
        for rank in reported:
            self.processes[rank].join(_PATIENCE_SECONDS)
        for process in self.processes:
            _kill_session(process)
            process.join()
            process.close()
        for connection in self.connections:
            connection.close()

    def _replay_output(self) -> None:
        for me in self.ranks:
            sys.stdout.writelines(f"[rank {me.rank}] {line}\n" for line in _read(me.output).splitlines())


def _free_port() -> int:
    """Return a port that nobody has; drawn at random, so that neighbouring test processes draw different ones."""
    while True:
        port = 20000 + secrets.randbelow(40000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _signal(process: BaseProcess, number: int) -> None:
    if process.pid is not None and process.exitcode is None:
        os.kill(process.pid, number)


def _kill_session(process: BaseProcess) -> None:
    if process.pid is None:
        return
    # No such session: the rank has not begun one yet, or all of it has left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _unpacked(data: bytes) -> tuple[Kind, dict[str, Any]]:
    try:
        return "returned", {"value": load(data)}
    except Exception as reason:  # pickle raises whatever the object's own hooks raise
        message = f"the returned value cannot be rebuilt in the test's process: {reason!r}. Return plain Python values."
        return "raised", {"error_types": ("builtins.TypeError",), "message": message}


def _stacks(path: Path) -> str:
    """Return the stacks once they are written whole, or say that the rank gave none."""
    until = time.monotonic() + _PATIENCE_SECONDS
    before, text = "", _read(path)
    while time.monotonic() < until and not (text and text == before):
        time.sleep(_TICK_SECONDS / 2)
        before, text = text, _read(path)
    return text or "(no stacks: the process did not answer to SIGUSR1)"


def _read(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return worker.without_harness(text)
