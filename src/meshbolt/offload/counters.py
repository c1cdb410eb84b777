"""What a file has moved so far, and in how many seconds."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Literal

Direction = Literal["read", "write"]


@dataclass(frozen=True)
class Traffic:
    """What a file has done since it was made; the difference of two is what it did between them.

    Attributes:
        read_bytes: that came from the file.
        read_seconds: in which at least one block was being read. Bytes over seconds is the bandwidth that was had.
        written_bytes: that went to the file.
        write_seconds: in which at least one block was being written.
    """

    read_bytes: int = 0
    read_seconds: float = 0.0
    written_bytes: int = 0
    write_seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        """Return what two files have done."""
        return Traffic(
            self.read_bytes + other.read_bytes,
            self.read_seconds + other.read_seconds,
            self.written_bytes + other.written_bytes,
            self.write_seconds + other.write_seconds,
        )

    def __sub__(self, earlier: Traffic) -> Traffic:
        """Return what was done since an earlier moment."""
        return Traffic(
            self.read_bytes - earlier.read_bytes,
            self.read_seconds - earlier.read_seconds,
            self.written_bytes - earlier.written_bytes,
            self.write_seconds - earlier.write_seconds,
        )


class _Lane:
    """One direction: its bytes, and its seconds with anything under way."""

    def __init__(self) -> None:
        self.num_bytes, self.seconds = 0, 0.0
        self._under_way, self._since = 0, 0.0

    def begin(self, now: float) -> None:
        """Note that something is under way."""
        if not self._under_way:
            self._since = now
        self._under_way += 1

    def end(self, now: float, num_bytes: int) -> None:
        """Note that something has ended."""
        self.num_bytes += num_bytes
        self._under_way -= 1
        if not self._under_way:
            self.seconds += now - self._since

    def seconds_until(self, now: float) -> float:
        """Return the seconds, with those of what is still under way."""
        return self.seconds + (now - self._since if self._under_way else 0.0)


class Counters:
    """Counts what several threads move."""

    def __init__(self) -> None:
        self._lanes: dict[Direction, _Lane] = {"read": _Lane(), "write": _Lane()}
        self._lock = threading.Lock()

    def begin(self, direction: Direction) -> None:
        """Note that a block is under way."""
        with self._lock:
            self._lanes[direction].begin(time.perf_counter())

    def end(self, direction: Direction, num_bytes: int) -> None:
        """Note that a block has ended.

        Args:
            direction: as at its beginning.
            num_bytes: that were moved; 0 for a block that failed.
        """
        with self._lock:
            self._lanes[direction].end(time.perf_counter(), num_bytes)

    def snapshot(self) -> Traffic:
        """Return what was done so far, with blocks under way in the seconds but not in the bytes."""
        with self._lock:
            now, read, write = time.perf_counter(), self._lanes["read"], self._lanes["write"]
            return Traffic(read.num_bytes, read.seconds_until(now), write.num_bytes, write.seconds_until(now))
