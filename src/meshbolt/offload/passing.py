"""One way through the chunks that are to be updated, and what it has done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from meshbolt.offload.layout import StateChunk
from meshbolt.offload.requests import Request
from meshbolt.offload.rules import Rule
from meshbolt.offload.tiers import Columns, FileTier, Tier
from meshbolt.offload.traffic import Moved, Observer, OffloadTraffic, Ways
from meshbolt.offload.transfers import Transfers, Visit
from meshbolt.offload.update import ChunkUpdate

AHEAD = 2
"""How many chunks have their gradients copied to the host before they are updated."""


Waiting = Literal["step", "forward", "other"]


@dataclass
class Counters:
    """What updates have done so far.

    Attributes:
        updated_bytes: of columns that were passed through.
        update_seconds: that threads of the host were busy with updates.
        busy_seconds: that the thread of updates worked, and waited for gradients and files.
        waits: seconds that the caller had to wait for updates, which nothing hid: in a step, before a forward, elsewhere.
        observer: is told of waits, updates and transfers; None: nobody is.
    """

    updated_bytes: int = 0
    update_seconds: float = 0.0
    busy_seconds: float = 0.0
    waits: dict[Waiting, float] = field(default_factory=lambda: {"step": 0.0, "forward": 0.0, "other": 0.0})
    observer: Observer | None = None

    @property
    def waited_seconds(self) -> float:
        """How long the caller waited, wherever."""
        return sum(self.waits.values())

    @contextmanager
    def waiting(self, where: Waiting) -> Iterator[None]:
        """Count what is inside as waiting.

        Args:
            where: the caller is.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.waits[where] += end - start
            if self.observer is not None and end - start > _WORTH_A_SPAN:
                self.observer("step: waits", _NAMES[where], start, end)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count what is inside as work of the thread of updates."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.busy_seconds += time.perf_counter() - start

    def note_update(self, chunk: StateChunk, start: float) -> None:
        """Note that a chunk is updated.

        Args:
            chunk: it.
            start: when its update began.
        """
        end = time.perf_counter()
        self.update_seconds += end - start
        self.updated_bytes += chunk.column_bytes * len(chunk.columns)
        if self.observer is not None:
            self.observer("updates", f"update chunk {chunk.number}", start, end)


def traffic_of(counters: Counters, *, tiers: Iterable[Tier], transfers: Iterable[Transfers]) -> OffloadTraffic:
    """Return the running totals of one optimizer.

    Args:
        counters: what its updates have done.
        tiers: the places of its state.
        transfers: between the model and these places; the same ones may be there twice.
    """
    files = [tier for tier in tiers if isinstance(tier, FileTier)]
    between = [each.moved() for each in dict.fromkeys(transfers)]
    return OffloadTraffic(
        state=sum([*between, *(file.moved() for file in files)], Ways()),
        updated=Moved(counters.updated_bytes, counters.updated_bytes, counters.update_seconds),
        busy_seconds=counters.busy_seconds,
        step_wait_seconds=counters.waits["step"],
        forward_wait_seconds=counters.waits["forward"],
        other_wait_seconds=counters.waits["other"],
        read_wait_seconds=sum(file.read_wait_seconds for file in files),
        room_wait_seconds=sum(file.room_wait_seconds for file in files),
    )


_NAMES: Mapping[Waiting, str] = {
    "step": "wait for updates in the step",
    "forward": "wait for updates before a forward",
    "other": "wait for updates",
}
_WORTH_A_SPAN = 2e-5  # seconds; before each forward somebody asks, and hardly ever has to wait


class Pass:
    """One way through chunks of one tier, with gradients of the next ones on their way."""

    def __init__(
        self,
        visits: Mapping[int, Visit],
        *,
        rule: Rule,
        threads: int,
        transfers: Transfers,
        done: Callable[[Visit], None],
        then: Sequence[StateChunk],
    ) -> None:
        """Prepare it.

        Args:
            visits: of the chunks, by their number, in the order they are to be updated in.
            rule: the optimizer's.
            threads: that torch's operations use on the host.
            transfers: between the model and the tier.
            done: is called with each visit when its parameters are on their way back.
            then: what the next pass over the tier probably begins with.
        """
        self._visits, self._rule, self._threads = visits, rule, threads
        self._transfers, self._done, self._then = transfers, done, then
        self._to_begin = deque(visits.values())
        self._begun: set[int] = set()

    def run(self, tier: Tier, counters: Counters) -> None:
        """Update all chunks.

        Args:
            tier: where they lie.
            counters: what is done is added to them.
        """
        self._tier, self._counters = tier, counters
        tier.visit([visit.chunk for visit in self._visits.values()], self._update, then=self._then)

    def _update(self, chunk: StateChunk, columns: Columns) -> Sequence[Request]:
        visit = self._visits[chunk.number]
        self._begin(visit)
        while self._to_begin and len(self._begun) < 1 + AHEAD:
            self._begin(self._to_begin.popleft())
        gradients = self._transfers.gradients(visit)
        start = time.perf_counter()
        on_host = not columns or next(iter(columns.values())).device.type == "cpu"
        with self._transfers.computing():
            ChunkUpdate(
                visit=visit,
                columns=columns,
                gradients=gradients,
                rule=self._rule,
                writes_shards=self._transfers.writes_shards,
            ).run(threads=self._threads if on_host else 1)
        self._counters.note_update(chunk, start)
        reading = self._transfers.end(visit, columns, resident=self._tier.resident)
        self._begun.discard(chunk.number)
        self._done(visit)
        return reading

    def _begin(self, visit: Visit) -> None:
        if visit.chunk.number not in self._begun:
            self._begun.add(visit.chunk.number)
            self._transfers.begin(visit)


class Order:
    """Remembers which chunk followed which, to tell what comes next: steps are alike."""

    def __init__(self) -> None:
        self._next: dict[int, StateChunk] = {}
        self._last: int | None = None

    def after(self, chunks: Sequence[StateChunk], *, count: int = AHEAD) -> list[StateChunk]:
        """Note what is updated now; return what followed it the last time.

        Args:
            chunks: of one tier, in their order.
            count: of those that are returned, at most.
        """
        for chunk in chunks:
            if self._last is not None:
                self._next[self._last] = chunk
            self._last = chunk.number
        found: list[StateChunk] = []
        while len(found) < count and (following := self._next.get((found or chunks)[-1].number)) is not None:
            if following in found:
                break
            found.append(following)
        return found
