"""The thread of updates, in which torch's operations use as many threads as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch


class UpdateLine:
    """Works jobs off in their order, in a thread that starts with the first.

    Each kernel divides its elements among threads of torch's own, which need no interpreter: threads of Python that share a chunk
    would wait for it, and for the thread that feeds the GPU, longer than they compute.
    """

    def __init__(self, threads: int) -> None:
        """Choose the number of threads.

        Args:
            threads: that compute at once, at least 1, whatever OMP_NUM_THREADS says.
        """
        self.threads = max(1, threads)
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        self._is_here = False

    @contextmanager
    def here(self, wanted: bool) -> Iterator[None]:
        """Work jobs off in the caller's thread for a while, in `submit`, unless others are still worked off.

        Who waits for a job loses nothing, and a kernel begins earlier: OpenMP's threads look for work for a while after each
        kernel, before they sleep, only as long as there are no more of them than processors. Those of a second thread are.

        Args:
            wanted: False: do nothing.
        """
        # Another number of threads would stay with the caller.
        before, self._is_here = self._is_here, wanted and torch.get_num_threads() == self.threads
        try:
            yield
        finally:
            self._is_here = before

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Call a function behind all those that were submitted before it.

        Args:
            job: may compute.
        """
        if self._is_here and (self._last is None or self._last.done()):
            return self._done_here(job)
        if self._thread is None:
            self._thread = self._start()
        self._last = self._thread.submit(job)
        return self._last

    def close(self) -> None:
        """End the thread, when the jobs have ended."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._thread = None

    @staticmethod
    def _done_here(job: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        try:
            job()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return future

    def _start(self) -> ThreadPoolExecutor:
        def begin() -> None:
            torch.get_num_threads()  # a thread's first question sets its number to everybody's
            torch.set_num_threads(self.threads)

        before = torch.get_num_threads()
        thread = ThreadPoolExecutor(1, thread_name_prefix="meshbolt-update")
        thread.submit(begin).result()
        # What a thread sets counts for itself and for those that start later, which are not ours.
        torch.set_num_threads(before)
        return thread
