"""An operating system that fails on request, in front of the real one; and files that say nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meshbolt.offload import StateFile, SystemCalls, aligned_bytes

# Given what is to be moved ("read" or "write", offset, bytes), returns how many bytes are said to have been, or raises.
Fault = Callable[[str, int, int], int]
PAGE = 4096


def no_fault(_what: str, _offset: int, num_bytes: int) -> int:
    return num_bytes


class FaultyFace(SystemCalls):
    """Asks a fault before each transfer, and keeps what was asked of the system in the order it was."""

    def __init__(self, fault: Fault = no_fault) -> None:
        self.fault: Fault = no_fault
        self.armed = fault
        self.asked: list[tuple[str, int]] = []
        self._lock = threading.Lock()

    def arm(self) -> None:
        """From now on faults happen; making a file comes before."""
        self.fault = self.armed

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        count = self._ask("read", into, offset)
        return min(count, super().read(fd, into[: aligned_bytes(count)], offset))

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        count = self._ask("write", data, offset)
        return min(count, super().write(fd, data[: aligned_bytes(count)], offset))

    def _ask(self, what: str, view: memoryview, offset: int) -> int:
        with self._lock:
            self.asked.append((what, offset))
        return self.fault(what, offset, len(view))


def make_file(folder: Path, num_bytes: int, **options: Any) -> StateFile:
    """A file of small blocks that reports to nobody."""
    options = {"block_bytes": PAGE, "say": lambda text: None, "timeout_seconds": 20.0, **options}
    file = StateFile(folder, num_bytes, **options)
    if isinstance(file._face, FaultyFace):
        file._face.asked.clear()
        file._face.arm()
    return file


def cut(file: StateFile, num_bytes: int) -> None:
    """Truncate a file from outside, as far as anybody can who has no name for it."""
    os.truncate(f"/proc/self/fd/{file._scratch.fd}", num_bytes)


def error_of(code: int) -> OSError:
    return OSError(code, os.strerror(code))
