"""Heartbeats of ranks: who is late or silent is found out, and what every rank is doing is collected.

A thread of each rank writes a beat into the store through which the ranks once found each other, over a connection of its own,
and looks at that of the next rank: three small requests at a time, however many ranks there are, and whatever holds up the main
thread. A rank that is late by its own clock, or whose neighbour is silent, sounds the alarm; then all answer with their stacks,
the one that sounded it judges, and all end. Clocks are never compared.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from meshbolt.compat import Collective, recorded_collectives
from meshbolt.monitoring.interrupt import stacks_of_other
from meshbolt.monitoring.stacks import ThreadStack, current_stacks
from meshbolt.monitoring.verdict import Report, Verdict, judge, report_lines
from meshbolt.units import format_seconds

# How long ranks have to answer an alarm, and how long those that have answered wait for the verdict.
ANSWER_SECONDS, VERDICT_SECONDS = 12.0, 30.0
_REQUEST = timedelta(seconds=10)
_GONE = "gone"
_TICK_SECONDS = 0.05


class Mark(NamedTuple):
    """A point of the run that the main thread has reached.

    Attributes:
        number: how many there were; all ranks pass the same ones.
        doing: what comes now.
        at_seconds: when, on this rank's monotonic clock.
        patience_seconds: how long it may be until the next one.
    """

    number: int
    doing: str
    at_seconds: float
    patience_seconds: float


class Heartbeats:
    """The thread of one rank."""

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        store: Any,
        key: str,
        silence_seconds: float,
        arrival_seconds: float,
        end: Callable[[Verdict, str], None],
        step: Callable[[], int] = lambda: 0,
        stacks_file: str = "",
        interval_seconds: float = 1.0,
    ) -> None:
        """Prepare; nothing is written before `start`.

        Args:
            rank: of this process.
            world: how many ranks there are.
            store: that all reach; of one rank None.
            key: of what is written there; the same on all ranks, and of no other run.
            silence_seconds: after which a rank without beats counts as gone.
            arrival_seconds: after which one that has not given any does.
            end: is called in this thread with the verdict, and on one rank with all that is known, on the others with "".
            step: returns the step of the optimizer, in any thread: asked for only when it is told.
            stacks_file: into which this process writes its stacks when another one asks by a signal; see `Interrupt`.
            interval_seconds: between beats.
        """
        self._rank, self._world, self._key = rank, world, key
        self._store: Any = None if store is None else store.clone()  # the main thread may wait in the other one
        if self._store is not None:
            self._store.set_timeout(_REQUEST)
        self._silence_seconds, self._arrival_seconds, self._interval_seconds = (
            silence_seconds,
            arrival_seconds,
            interval_seconds,
        )
        self._end, self._step = end, step
        self._mark = Mark(0, "the set-up", time.monotonic(), float("inf"))
        self._beats, self._alarms = 0, 0
        self._neighbour = _Neighbour((rank + 1) % world)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meshbolt: heartbeats", daemon=True)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "space": _process_space(), "stacks_file": stacks_file}
        self._who: dict[str, Any] = who

    def mark(self, doing: str, *, patience_seconds: float) -> None:
        """Note that the main thread has got to a point of the run.

        Args:
            doing: what comes now.
            patience_seconds: how long it may be until the next call.
        """
        self._mark = Mark(self._mark.number + 1, doing, time.monotonic(), patience_seconds)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Say that this rank is done, and end the thread; again, it does nothing."""
        self._over.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * self._interval_seconds + 1.0)

    def lost_ranks(self, patience_seconds: float) -> dict[int, str]:
        """Return the ranks of this machine whose processes are gone; for a run that has ended by an error.

        Args:
            patience_seconds: how long to look.
        """
        until, lost = time.monotonic() + patience_seconds, dict[int, str]()
        with suppress(RuntimeError):
            while self._store is not None and not lost and time.monotonic() < until:
                for rank in range(self._world):
                    look = _Neighbour(rank)
                    look.see(self._beat_of(rank))
                    why = look.is_gone(self._who, 0.0)
                    if why is not None and "done" not in (self._beat_of(rank) or {}):
                        lost[rank] = why
                time.sleep(_TICK_SECONDS)
        return lost

    # The thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._over.wait(self._interval_seconds):
            try:
                alarm = self._tick()
                verdict = None if alarm is None else self._answer(alarm)
            except RuntimeError:  # whoever keeps the store is gone, and this rank is on its own
                verdict = self._alone()
            if verdict is not None and not self._over.is_set():
                self._end(*verdict)
                return
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(self._name("beat", self._rank), json.dumps({"done": True}))

    def _tick(self) -> dict[str, Any] | None:
        """Beat, and return the alarm that there is or is to be."""
        mark = self._mark
        why = self._lateness(mark)
        if self._store is None:
            return None if why is None else {"by": self._rank, "why": why}
        self._beats += 1
        beat = {"beats": self._beats, "step": self._step(), "doing": mark.doing, **self._who}
        self._store.set(self._name("beat", self._rank), json.dumps(beat))
        alarm = self._name("alarm")
        if self._store.check([alarm]):
            return _loaded(self._store.get(alarm))
        why = why or self._silence()
        if why is None:
            return None
        return _loaded(self._store.compare_set(alarm, "", json.dumps({"by": self._rank, "why": why})))

    def _lateness(self, mark: Mark) -> str | None:
        seconds = time.monotonic() - mark.at_seconds
        if seconds <= mark.patience_seconds:
            return None
        limit = format_seconds(mark.patience_seconds)
        return f"rank {self._rank} has been in {mark.doing} of step {self._step()} for more than {limit}"

    def _silence(self) -> str | None:
        """Look at the next rank that is not done, and return why it counts as gone if it does."""
        beat = self._beat_of(self._neighbour.rank)
        if beat is not None and "done" in beat:
            self._neighbour = _Neighbour((self._neighbour.rank + 1) % self._world)
            return None
        if self._neighbour.rank == self._rank:
            return None
        self._neighbour.see(beat)
        why = self._neighbour.is_gone(self._who, 2 * self._interval_seconds)
        limit = self._arrival_seconds if beat is None else self._silence_seconds
        if why is None and self._neighbour.silent_seconds > limit:
            why = f"has given no sign of life for {format_seconds(limit)}"
        return None if why is None else f"rank {self._neighbour.rank} {why}"

    def _beat_of(self, rank: int) -> dict[str, Any] | None:
        key = self._name("beat", rank)
        return _loaded(self._store.get(key)) if self._store.check([key]) else None

    # An alarm ---------------------------------------------------------------------------------------------------------

    def _answer(self, alarm: dict[str, Any]) -> tuple[Verdict, str] | None:
        """Say what this rank is doing, and return the verdict; None where the run has gone on meanwhile."""
        own = self.report()
        if self._store is None:
            return judge([own], {}), "\n".join([f"{alarm['why']}.", *report_lines([own], {})])
        self._store.set(self._name("report", self._rank), json.dumps(asdict(own)))
        if alarm["by"] == self._rank:
            verdict, text = self._judged(alarm, own)
            self._store.set(self._name("verdict"), json.dumps({} if verdict is None else asdict(verdict)))
        else:
            verdict, text = self._told(), ""
        self._alarms += 1
        return None if verdict is None else (verdict, text)

    def _judged(self, alarm: dict[str, Any], own: Report) -> tuple[Verdict | None, str]:
        reports, until = {self._rank: own}, time.monotonic() + ANSWER_SECONDS
        while len(reports) < self._world and time.monotonic() < until and not self._over.wait(_TICK_SECONDS):
            for rank in range(self._world):
                if rank not in reports and self._store.check([self._name("report", rank)]):
                    reports[rank] = _report(_loaded(self._store.get(self._name("report", rank))))
            if time.monotonic() > until - ANSWER_SECONDS + 2 * self._interval_seconds:
                silent = [rank for rank in range(self._world) if rank not in reports]
                until = 0.0 if all(map(self._cannot_answer, silent)) else until
        missing = {rank: self._why_missing(rank) for rank in range(self._world) if rank not in reports}
        missing = {rank: why for rank, why in missing.items() if why}
        if not missing and self._mark.number != own.mark:
            return None, ""  # it was slow, and has gone on
        ordered = [reports[rank] for rank in sorted(reports)]
        verdict = judge(ordered, missing)
        return verdict, "\n".join([f"{alarm['why']}.", f"{verdict.why}.", *report_lines(ordered, missing)])

    def _told(self) -> Verdict | None:
        key, until = self._name("verdict"), time.monotonic() + VERDICT_SECONDS
        while not self._store.check([key]):
            if time.monotonic() > until or self._over.wait(_TICK_SECONDS):
                return Verdict((), "the rank that sounded the alarm gives no verdict: it may be gone")
        content = _loaded(self._store.get(key))
        return None if not content else Verdict(tuple(content["culprits"]), content["why"])

    def _cannot_answer(self, rank: int) -> bool:
        """Return whether it is certain that a rank will not answer."""
        beat = self._beat_of(rank)
        if beat is None or "done" in beat:
            return beat is not None
        return _is_here(beat, self._who) and _state_of(beat["pid"]) in (_GONE, "stopped")

    def _why_missing(self, rank: int) -> str:
        beat = self._beat_of(rank)
        if beat is None:
            return "has never given a sign of life"
        if "done" in beat:
            return ""
        last = f"was last seen in {beat['doing']} of step {beat['step']} ({beat['host']}, process {beat['pid']})"
        if not _is_here(beat, self._who):
            return f"does not answer, and {last}: its process is gone, is stopped, or holds Python's lock"
        state = _state_of(beat["pid"])
        if state in (_GONE, "stopped"):
            return f"is {state}: it {last}"
        stacks = stacks_of_other(beat["pid"], beat["stacks_file"])
        return f"does not answer, as it holds Python's lock in code that is not Python's, and {last}" + (
            f"; it was doing:\n{stacks}" if stacks else ""
        )

    def _alone(self) -> tuple[Verdict, str] | None:
        mark = self._mark
        why = self._lateness(mark)
        if why is None:
            return None
        own = self.report()
        reason = (
            "the store through which the ranks meet does not answer: rank 0 or the launcher, which keeps it, is gone"
        )
        return Verdict((), f"{why}, and {reason}"), "\n".join([f"{why}.", reason, *report_lines([own], {})])

    def report(self) -> Report:
        """Return what this rank is doing, with its stacks and collectives."""
        mark = self._mark
        return Report(
            rank=self._rank,
            host=str(self._who["host"]),
            pid=os.getpid(),
            mark=mark.number,
            doing=mark.doing,
            step=self._step(),
            seconds=time.monotonic() - mark.at_seconds,
            patience_seconds=mark.patience_seconds,
            stacks=tuple(current_stacks(but={threading.get_ident()})),
            collectives=tuple(recorded_collectives()),
        )

    def _name(self, what: str, rank: int | None = None) -> str:
        number = "" if what == "beat" else f"/{self._alarms}"
        return f"{self._key}/{what}{number}{'' if rank is None else f'/{rank}'}"


class _Neighbour:
    """Another rank, and when its beat was last seen to change."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._beat: dict[str, Any] | None = None
        self._changed = time.monotonic()

    def see(self, beat: dict[str, Any] | None) -> None:
        """Take a look at its last beat."""
        if beat != self._beat:
            self._beat, self._changed = beat, time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """How long nothing has changed."""
        return time.monotonic() - self._changed

    def is_gone(self, me: dict[str, Any], patience_seconds: float) -> str | None:
        """Return why it is certain that its process is gone; None: it is not, or cannot be seen from this machine."""
        beat = self._beat
        if beat is None or "done" in beat or self.silent_seconds < patience_seconds or not _is_here(beat, me):
            return None
        if _state_of(beat["pid"]) != _GONE:
            return None
        return f"({beat['host']}, process {beat['pid']}) is gone, and was last seen in {beat['doing']} of step {beat['step']}"


def _state_of(pid: int) -> str:
    """Return what the system says of a process of this machine."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return _GONE
    return {"Z": _GONE, "X": _GONE, "T": "stopped", "t": "stopped"}.get(letter, "at work")


def _is_here(beat: dict[str, Any], me: dict[str, Any]) -> bool:
    """Return whether a rank's process can be seen from here."""
    return bool(me["space"]) and (beat["host"], beat["space"]) == (me["host"], me["space"])


def _process_space() -> str:
    """Return which processes this one sees: containers of one machine have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _report(content: dict[str, Any]) -> Report:
    stacks = (
        ThreadStack(each["name"], tuple(each["lines"]), each["place"], each["waits"]) for each in content["stacks"]
    )
    collectives = (Collective(**{**each, "ranks": tuple(each["ranks"])}) for each in content["collectives"])
    return Report(**{**content, "stacks": tuple(stacks), "collectives": tuple(collectives)})


def _loaded(data: bytes) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(data) or {}
    return content
