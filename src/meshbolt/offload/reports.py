"""What a pass over chunks did, and when: the overlap of disk and updates, to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

What = Literal["read", "write", "update", "wait_read", "wait_write"]


@dataclass(frozen=True)
class Span:
    """Something that took from one moment to another.

    Attributes:
        what: "read" and "write" are transfers, from the moment they are asked for; the others are what the caller's thread
            did: "update", or wait for a transfer.
        chunk: its number in the pass; -1 for one that an earlier pass wrote.
        start_seconds: since the beginning of the pass; below zero for what an earlier pass began.
        end_seconds: likewise.
    """

    what: What
    chunk: int
    start_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_seconds - self.start_seconds


@dataclass
class StreamReport:
    """What a pass over chunks did, and when.

    Attributes:
        seconds: of the whole pass.
        read_bytes: that came from the file.
        written_bytes: that went to the file.
        spans: in the order in which they ended for the caller's thread.
    """

    seconds: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    spans: list[Span] = field(default_factory=list)

    @property
    def update_seconds(self) -> float:
        """How long the updates took."""
        return self._sum("update")

    @property
    def read_wait_seconds(self) -> float:
        """How long the caller's thread waited for chunks to be read."""
        return self._sum("wait_read")

    @property
    def write_wait_seconds(self) -> float:
        """How long the caller's thread waited for chunks to be written."""
        return self._sum("wait_write")

    def _sum(self, what: str) -> float:
        return sum(span.seconds for span in self.spans if span.what == what)
