"""Several hosts: the same command on each through ssh, their output in one place, and one end for all of them."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from meshbolt.errors import ConfigError
from meshbolt.launch.ending import ALIVE, BEAT_SECONDS, END, INTERRUPT
from meshbolt.launch.failures import MARK, Failure, in_order
from meshbolt.launch.hosts import Host

# No questions, for nobody could answer them; a host that is silent is given up.
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=3"),
)
_UNREACHABLE = 255
# Lines of ranks, and warnings of torch's launcher, which say nothing of why a host is gone.
_OF_TORCH = re.compile(r"\[rank |\[?[IW]\d{4} ")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LOOK_SECONDS = 0.1
# For the others to say what they met, once one has failed; and to be gone, beyond their grace, once they were told to end.
_LATER_SECONDS, _GONE_SECONDS = 3.0, 6.0
# Until ssh knows that a host is gone for which the others waited.
_SILENT_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How hosts are reached, and what is called on them.

    Attributes:
        ssh: the command and its options.
        folder: where it runs, on every host.
        variables: that every host is given.
        grace_seconds: that ranks have to end by themselves.
    """

    ssh: tuple[str, ...] = ("ssh",)
    folder: Path
    variables: Mapping[str, str]
    grace_seconds: int = 10

    def call(self, host: Host, words: Sequence[str]) -> list[str]:
        """Return the command that runs another one on a host.

        Args:
            host: the slots of which are all that it sees, where they were chosen.
            words: the command.
        """
        seen = {} if host.is_whole else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.slots))}
        pairs = [f"{name}={value}" for name, value in {**seen, **self.variables}.items()]
        there = f"cd {shlex.quote(str(self.folder))} && exec env {shlex.join([*pairs, *words])}"
        return [*self.ssh, *SSH_OPTIONS, host.name, there]

    def address_of(self, host: Host) -> str:
        """Return the address of a host as ssh knows it: that of its settings where the name stands for another.

        Args:
            host: where all are to meet.

        Raises:
            ConfigError: it is an address which means another machine on each.
        """
        lines: list[list[str]] = []
        with suppress(OSError, subprocess.CalledProcessError):  # none, or one that cannot tell
            asked = [*self.ssh, "-G", host.name]
            told = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
            lines = [line.split() for line in told.splitlines()]
        found = next((words[1] for words in lines if len(words) == 2 and words[0] == "hostname"), host.name)
        if found in _LOOPBACK:
            raise ConfigError(
                f"Other hosts cannot meet at {found}, which is what the first host, {host.name!r}, is called: it means another "
                "machine on each. Give it a name that all know, or --master-addr."
            )
        return found

    def reachable(self, hosts: Sequence[Host]) -> dict[str, str]:
        """Return, by name, why hosts cannot be reached: what ssh says; those that can be are left out.

        Args:
            hosts: to be asked.
        """
        asked = {
            host.name: subprocess.Popen(
                [*self.ssh, *SSH_OPTIONS, host.name, "true"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for host in hosts
        }
        answers = {name: (process.communicate()[1], process.returncode) for name, process in asked.items()}
        return {name: words.strip() or f"exit code {code}" for name, (words, code) in answers.items() if code}


@dataclass
class Outcome:
    """How a run on several hosts has ended.

    Attributes:
        code: 0, or that of the first failure.
        failures: in order.
        lost: names of the hosts that are not there any more.
        asked_to_end: the signal that did it, where one did.
    """

    code: int = 0
    failures: list[Failure] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    asked_to_end: int | None = None


def run_on(cluster: Cluster, commands: Mapping[Host, Sequence[str]]) -> Outcome:
    """Run a command on each host until all have ended; when one fails, or this process is asked to end, all do.

    Args:
        cluster: how they are reached.
        commands: by host.
    """
    ending = _Signals()
    with ending:
        runs = [_Remote(cluster, host, words) for host, words in commands.items()]
        try:
            _wait_while(lambda: not ending.number and any(run.is_there for run in runs) and not _failed(runs))
            begun = time.monotonic()
            _wait_while(lambda: not ending.number and _may_say_more(runs, seconds=time.monotonic() - begun))
        finally:
            _end(runs, word=INTERRUPT if ending.number == signal.SIGINT else END, seconds=cluster.grace_seconds)
    if ending.number and not _failed(runs, but_ended=True):
        return Outcome(code=128 + ending.number, asked_to_end=ending.number)
    failures = in_order([failure for run in runs for failure in run.failures()])
    lost = {run.host.name for run in runs if run.is_lost}
    code = failures[0].exit_code if failures else 0
    return Outcome(code=code, failures=failures, lost=lost, asked_to_end=ending.number)


def _wait_while(condition: Callable[[], bool], *, seconds: float = float("inf")) -> None:
    until = time.monotonic() + seconds
    while condition() and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)


def _failed(runs: Sequence[_Remote], *, but_ended: bool = False) -> bool:
    return any(run.reported for run in runs) or (not but_ended and any(run.code for run in runs))


def _may_say_more(runs: Sequence[_Remote], *, seconds: float) -> bool:
    if not _failed(runs) or not any(run.is_there for run in runs):
        return False
    is_known = any(run.is_lost or any(not each.is_of_another for each in run.reported) for run in runs)
    return seconds < (_LATER_SECONDS if is_known else _SILENT_SECONDS)


def _end(runs: Sequence[_Remote], *, word: bytes, seconds: float) -> None:
    for run in runs:
        run.end(word)
    _wait_while(lambda: any(run.is_there for run in runs), seconds=seconds + _GONE_SECONDS)
    for run in runs:
        run.close()


class _Signals:
    """Takes note of a signal that asks this process to end, for as long as it is entered."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.number = self.number or number


class _Remote:
    """A command on a host: its output comes here, and it lives for as long as its standard input is written to."""

    def __init__(self, cluster: Cluster, host: Host, words: Sequence[str]) -> None:
        self.host = host
        self.reported: list[Failure] = []
        self._has_begun, self._was_told, self._ended = False, False, 0.0
        self._last_words: list[str] = []
        self._process = subprocess.Popen(
            cluster.call(host, words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard is for the ranks; the connection is to outlive it
        )
        self._threads = [
            threading.Thread(target=self._pass_on, args=(self._process.stdout, sys.stdout), daemon=True),
            threading.Thread(target=self._pass_on, args=(self._process.stderr, sys.stderr), daemon=True),
            threading.Thread(target=self._beat, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def code(self) -> int | None:
        """The exit code, of the command or of ssh."""
        return self._process.poll()

    @property
    def is_there(self) -> bool:
        """Whether it still runs, as far as ssh knows."""
        return self.code is None

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended before the command has."""
        return not self._was_told and not self.reported and self.code == _UNREACHABLE

    def failures(self) -> list[Failure]:
        """Return what its ranks have reported, or that it is gone, or could not be begun."""
        if self.reported or self._was_told or not self.code:
            return self.reported
        said = "\n".join(self._last_words)
        if self._has_begun:
            words = f"The connection has ended, and with it whatever ran there.\n{said}" if self.is_lost else said
        elif self.code == _UNREACHABLE:
            words = f"It cannot be reached: {said}\nTry `ssh -o BatchMode=yes {self.host.name} true`, which must work alone."
        else:
            words = f"Nothing could be started there (exit code {self.code}): {said}"
        code = 1 if self.code == _UNREACHABLE else self.code
        rank_is_known = self._has_begun and not self.is_lost
        summary = words.partition("\n")[0]
        return [
            Failure(
                rank=None, host=self.host.name, code=code, words=words, summary=summary, is_of_another=rank_is_known
            )
        ]

    def end(self, word: bytes) -> None:
        """Tell the ranks there to end.

        Args:
            word: how.
        """
        if self.is_there:
            self._was_told = True
            self._write(word)
            with suppress(OSError, ValueError):
                self._stdin.close()

    def close(self) -> None:
        """Give the connection up, where it is still there, and read what has come through it."""
        self._process.kill()
        self._process.wait()
        with suppress(OSError, ValueError):
            self._stdin.close()
        for thread in self._threads:
            thread.join(timeout=2 * BEAT_SECONDS)

    @property
    def _stdin(self) -> IO[bytes]:
        stdin = self._process.stdin
        if stdin is None:
            raise ValueError("the process was made with a pipe for its input")
        return stdin

    def _write(self, word: bytes) -> bool:
        try:
            self._stdin.write(word)
            self._stdin.flush()
        except (OSError, ValueError):  # closed here or there
            return False
        return True

    def _beat(self) -> None:
        while self.is_there and self._write(ALIVE):
            time.sleep(BEAT_SECONDS)

    def _pass_on(self, source: IO[bytes], target: IO[str]) -> None:
        with source:
            for raw in source:
                line = raw.decode(errors="replace")
                if line.startswith(MARK):
                    self._hear(json.loads(line.removeprefix(MARK)))
                    continue
                if target is sys.stderr and not _OF_TORCH.match(line):
                    self._last_words = [*self._last_words[-4:], line.rstrip()]
                with suppress(ValueError, OSError):
                    target.write(line if line.startswith("[rank ") else f"[{self.host.name}] {line}")
                    target.flush()

    def _hear(self, message: Mapping[str, Any]) -> None:
        if message["event"] == "begun":
            self._has_begun = True
        else:
            self.reported += [Failure(**{**each, "host": self.host.name}) for each in message["failures"]]
