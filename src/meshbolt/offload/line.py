"""The threads of updates: one that works jobs off in their order, and helpers with which it shares the arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class UpdateLine:
    """Threads in which torch's own operations use one thread each; they start with the first job.

    The number of threads is then this one's, whatever OMP_NUM_THREADS says, and each kernel is called on as much as one of
    them takes.
    """

    def __init__(self, threads: int) -> None:
        """Choose the number of threads.

        Args:
            threads: that compute at once, at least 1.
        """
        self.threads = max(1, threads)
        self._first: ThreadPoolExecutor | None = None
        self._others: ThreadPoolExecutor | None = None

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Call a function behind all those that were submitted before it.

        Args:
            job: may call `share`.
        """
        if self._first is None:
            self._start()
        return self._first.submit(job)  # type: ignore[union-attr]

    def share(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Call functions at once, in the thread of a job and its helpers; return when all have ended.

        Args:
            tasks: about as long as each other.

        Raises:
            BaseException: the first that one of them raised.
        """
        others = [self._others.submit(task) for task in tasks[1:]] if self._others is not None else []
        try:
            for task in tasks[: len(tasks) - len(others)]:
                task()
        finally:
            errors = [other.exception() for other in others]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads, when the jobs have ended."""
        for threads in (self._first, self._others):
            if threads is not None:
                threads.shutdown(wait=True)
        self._first = self._others = None

    def _start(self) -> None:
        before = torch.get_num_threads()
        # A thread starts when there is a job and nobody idle: all wait here until all have started.
        met = threading.Barrier(self.threads + 1)

        def begin() -> None:
            torch.set_num_threads(1)
            met.wait()

        self._first = ThreadPoolExecutor(1, thread_name_prefix="meshbolt-update")
        futures = [self._first.submit(begin)]
        if self.threads > 1:
            self._others = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="meshbolt-update-helper")
            futures += [self._others.submit(begin) for _ in range(self.threads - 1)]
        met.wait()
        for future in futures:
            future.result()
        # What a thread sets counts for itself and for those that start later, which are not ours.
        torch.set_num_threads(before)
