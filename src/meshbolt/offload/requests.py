"""Transfers on their way, and the threads that make them."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable

import torch

from meshbolt.errors import StorageError
from meshbolt.offload.counters import Direction
from meshbolt.offload.uring import Steps
from meshbolt.units import format_seconds


class Request:
    """One transfer between a buffer and a file, in blocks that several threads move."""

    def __init__(
        self, direction: Direction, name: str, buffer: torch.Tensor, *, blocks: int, timeout_seconds: float
    ) -> None:
        """Prepare; nothing moves yet.

        Args:
            direction: "read" or "write".
            name: what is moved, for messages.
            buffer: kept alive until the last block has ended.
            blocks: how many will be run.
            timeout_seconds: the longest wait for the disk.
        """
        self.direction, self.name = direction, name
        self._timeout_seconds = timeout_seconds
        self.submitted = self.ended = time.perf_counter()
        self.error: StorageError | None = None
        self._buffer: torch.Tensor | None = buffer
        self._left, self._unwanted, self._stuck = blocks, False, False
        self._lock, self._over = threading.Lock(), threading.Event()

    @property
    def done(self) -> bool:
        """Whether the buffer is nobody's but the caller's again, and the transfer has succeeded or failed."""
        return self._over.is_set()

    def wait(self) -> None:
        """Wait until all of it has been moved. The buffer is the caller's again when this returns or raises what went wrong.

        Raises:
            StorageError: a block could not be moved; or the disk is stuck, and the buffer still belongs to the transfer.
        """
        self._stuck = not self._over.wait(self._timeout_seconds)
        if self._stuck:
            raise self.stuck_error()
        if self.error is not None:
            raise self.error

    def run(self, move: Callable[[], None]) -> None:
        """Move one block, or nothing once another one has failed; an error is kept for `wait`.

        Args:
            move: raises StorageError for what can go wrong.
        """
        error: BaseException | None = None
        try:
            if self._unwanted:
                error = StorageError(f"{self.name} was abandoned before all of it had been moved.")
            elif self.error is None:
                move()
        except BaseException as raised:
            error = raised
        self.end_block(error)

    def wanted(self, steps: Steps) -> Steps:
        """Yield what moves a block, or nothing once another one has failed or this transfer was abandoned.

        Args:
            steps: of the block.
        """
        if self._unwanted:
            raise StorageError(f"{self.name} was abandoned before all of it had been moved.")
        if self.error is None:
            yield from steps

    def end_block(self, error: BaseException | None) -> None:
        """Note that one block has ended.

        Args:
            error: what went wrong, kept for `wait`; None: nothing.
        """
        if error is not None and not isinstance(error, StorageError):  # a defect, but the caller must not wait for ever
            told = StorageError(f"{self.name}: {type(error).__name__}: {error}")
            told.__cause__ = error
            error = told
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            if self._left:
                return
            self.ended, self._buffer = time.perf_counter(), None
        self._over.set()

    def stuck_error(self) -> StorageError:
        """Return the error for a transfer that does not end."""
        return StorageError(
            f"{self.name} has not ended after {format_seconds(self._timeout_seconds)}: the disk does not answer. See the "
            "kernel's log (`dmesg`); if it is only slow, give a path on another one."
        )

    def abandon(self) -> None:
        """Leave out the blocks that have not begun; `wait` then raises, unless there are none."""
        self._unwanted = True

    def settle(self) -> bool:
        """Wait as `wait` does, but raise nothing; a disk that was found stuck is not waited for again.

        Returns:
            Whether it is over, so that the buffer is free.
        """
        self._stuck = not self._over.wait(0.0 if self._stuck else self._timeout_seconds)
        return not self._stuck


class Workers:
    """A few threads that run what they are given, in its order; they end with this object, closed or forgotten."""

    def __init__(self, count: int, name: str) -> None:
        """Start them.

        Args:
            count: how many.
            name: what theirs begin with.
        """
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Daemons: a thread that a broken disk never answers must not hold up the end of the process.
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"{name} {number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()
        self._dismiss = weakref.finalize(self, _dismiss, self._jobs, count)

    def submit(self, job: Callable[[], None]) -> None:
        """Have something run, soon.

        Args:
            job: raises nothing.
        """
        self._jobs.put(job)

    def close(self, timeout_seconds: float) -> bool:
        """Let them finish what they were given, and end.

        Args:
            timeout_seconds: the longest wait.

        Returns:
            Whether all have ended.
        """
        self._dismiss()
        until = time.monotonic() + timeout_seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        job()
        del job  # or the buffer and the file in it would live until the next one comes


def _dismiss(jobs: queue.SimpleQueue[Callable[[], None] | None], count: int) -> None:
    for _ in range(count):
        jobs.put(None)
