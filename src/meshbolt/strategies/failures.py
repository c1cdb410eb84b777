"""A rank that fails tells the others of its pipeline, which wait for what it was to send, and would wait until the timeout.

Nothing is asked or sent as long as steps go well. A rank that meets an error writes it into the store through which the ranks
once found each other. Then it ends its connections, which wakes whoever waits for it; who was woken so finds the error in the
store, and ends with that instead of one of a broken connection. Where all ranks meet errors of their own, as before any of them
has waited for another, connections stay: ranks may still save a checkpoint together.

NCCL's connections cannot be ended from one side: there the ranks that wait end with the process of the one that failed, as
launchers see to it, or at the timeout.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from meshbolt.compat import end_connections, is_broken_connection
from meshbolt.errors import RankError
from meshbolt.strategies.compat import default_store

# How long a rank that fails waits for others that fail too; for those that it has woken to ask why; and these for a word.
_ALIKE, _ASKED, _WORD = timedelta(seconds=1), timedelta(seconds=1), timedelta(seconds=1)
# By how much the rank that failed is the first to show its error.
_LATER_SECONDS = 0.5
_FRAMES = 15
_TOLD = "_meshbolt_told"
_runs = itertools.count()


class Failures:
    """Tells other ranks of errors of this one, and this one of theirs; made on all ranks in the same order.

    Args:
        place: this rank in words, such as "rank 1 (stage 1 of 2)".
        parting: called where ranks part for good, so that nothing is done together any more.
    """

    def __init__(self, place: str, *, parting: Callable[[], None] = lambda: None) -> None:
        self._place, self._parting = place, parting
        self._run, self._times = next(_runs), 0

    @contextmanager
    def told(self, step: str) -> Iterator[None]:
        """Tell the others of an error inside.

        Args:
            step: what the ranks do together, for the message.

        Raises:
            RankError: another rank has failed, for which this one waited.
        """
        try:
            yield
        except BaseException as error:  # others wait for this rank whatever it ends with
            other = self.tell(error, step)
            if other is None:
                raise
            raise other from None

    def tell(self, error: BaseException, step: str) -> RankError | None:
        """Tell the others of an error, once.

        Args:
            error: that this rank has met.
            step: what the ranks do together.

        Returns:
            What to raise instead where the error only says that another rank is gone.
        """
        if hasattr(error, _TOLD):
            return None
        self._times += 1
        board = _Board(f"meshbolt/pipeline/{self._run}/{self._times}")
        if is_broken_connection(error):
            found = self._found(board, step, error)
            setattr(found, _TOLD, True)
            self._part()
            return found
        with suppress(AttributeError):  # of a class with slots
            setattr(error, _TOLD, True)
        with suppress(RuntimeError):  # the rank that keeps the store is gone
            board.write(self._words(error, step))
            if board.all_have_written():
                return None
        self._part()
        with suppress(RuntimeError):
            board.wait_for_readers()
        return None

    def _part(self) -> None:
        self._parting()
        end_connections()

    def _words(self, error: BaseException, step: str) -> str:
        what = "".join(traceback.format_exception_only(type(error), error)).strip()
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-_FRAMES))
        return f"{self._place} failed: {what}\n(in {step}; what it was doing:)\n{trace}"

    def _found(self, board: _Board, step: str, error: BaseException) -> RankError:
        words = None
        with suppress(RuntimeError):
            words = board.read()
        if words is not None:
            return RankError(f"{words}\nThis is {self._place}, which waited for it in {step}.")
        return RankError(
            f"{self._place} waited in {step} for another rank, which is gone or did not answer in time, and has left no word "
            f"({str(error).splitlines()[0]}). If its process was killed, its own output or the launcher's says so. A step that "
            "calls a collective of its own (torch.distributed, a metric with dist_sync_on_step) waits for ever where only the "
            "ranks of some stages come to that line: call it in a hook behind the step."
        )


class _Board:
    """What ranks write of one failure, in the store that all of them reach."""

    def __init__(self, prefix: str) -> None:
        self._store: Any = default_store()
        self._prefix = prefix

    def write(self, words: str) -> None:
        """Write what this rank has met; the first to write is the one that others are told of."""
        self._store.compare_set(self._key("first"), "", words)
        if self._store.add(self._key("written"), 1) == dist.get_world_size():
            self._store.set(self._key("all"), "yes")

    def all_have_written(self) -> bool:
        """Return whether all ranks have met an error of their own within a short while."""
        return self._comes("all", _ALIKE)

    def wait_for_readers(self) -> None:
        """Wait a short while until the others have read, since this rank may keep the store; then let them go on."""
        self._comes("read by all", _ASKED)
        self._store.set(self._key("shown"), "yes")

    def read(self) -> str | None:
        """Return what the first rank has written, a moment after that rank has gone on with its error; None: none has."""
        if not self._comes("first", _WORD):
            return None
        words: bytes = self._store.get(self._key("first"))
        with suppress(RuntimeError):
            writers, readers = self._store.add(self._key("written"), 0), self._store.add(self._key("readers"), 1)
            if writers + readers >= dist.get_world_size():
                self._store.set(self._key("read by all"), "yes")
            self._comes("shown", _ASKED + _ALIKE)
            time.sleep(_LATER_SECONDS)
        return words.decode()

    def _comes(self, name: str, patience: timedelta) -> bool:
        try:
            self._store.wait([self._key(name)], patience)
        except RuntimeError:  # stores have several classes for it
            return bool(self._store.check([self._key(name)]))
        return True

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"
