"""A rank that fails tells the others, which wait for what it was to send, and would wait until the timeout.

Nothing is asked or sent as long as a run goes well. A rank that meets an error writes it into the store through which the ranks
once found each other. Then it ends its connections, which wakes whoever waits for it; who was woken so finds the error in the
store, and ends with that instead of one of a broken connection. Where all ranks meet errors of their own, as before any of them
has waited for another, connections stay: ranks may still save a checkpoint together. A checkpoint that is being written in the
background is finished in any case.

NCCL's connections cannot be ended from one side: there the ranks that wait end with the process of the one that failed, as
launchers see to it, or at the timeout.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from meshbolt.compat import end_connections, is_broken_connection
from meshbolt.errors import RankError
from meshbolt.strategies.attendance import Attendance
from meshbolt.strategies.compat import default_store, is_met_by_all, ranks_are_connected
from meshbolt.strategies.saving import Saving

# How long a rank that fails waits for others that fail too; for those that it has woken to ask why; and these for a word.
_ALIKE, _ASKED, _WORD = timedelta(seconds=2), timedelta(seconds=1), timedelta(seconds=1)
# By how much the rank that failed is the first to show its error.
_LATER_SECONDS = 0.5
_FRAMES = 15
_TOLD = "_meshbolt_told"
_runs = itertools.count()

Doing = str | Callable[[], str]
"""What ranks do together, for the message, or what says so."""


class Failures:
    """Tells other ranks of errors of this one, and this one of theirs; connected on all ranks in the same order.

    Attributes:
        place: this rank in words, such as "rank 1 (stage 1 of 2)".
    """

    def __init__(self, attendance: Attendance, saving: Saving) -> None:
        """Prepare; ranks need not exist yet, and as long as they do not nothing is told.

        Args:
            attendance: dismissed where ranks part for good.
            saving: what it has under way in the background goes on.
        """
        self._attendance, self._saving = attendance, saving
        self.place = ""
        self._run: int | None = None
        self._times = 0
        self._ended: RankError | None = None

    def connect(self) -> None:
        """Begin, when the ranks are connected."""
        self._run, self.place = next(_runs), f"rank {dist.get_rank()}"

    @contextmanager
    def told(self, doing: Doing) -> Iterator[None]:
        """Tell the others of an error inside.

        Args:
            doing: what the ranks do together.

        Raises:
            RankError: another rank has failed, for which this one waited.
        """
        try:
            yield
        except BaseException as error:  # others wait for this rank whatever it ends with
            other = self.tell(error, doing)
            if other is None:
                raise
            raise other from other.__cause__

    def run(self, doing: Doing, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function, and tell the others of an error in it; see `told`."""
        with self.told(doing):
            return function(*args, **kwargs)

    def tell(self, error: BaseException, doing: Doing) -> RankError | None:
        """Tell the others of an error, once.

        Args:
            error: that this rank has met.
            doing: what the ranks do together.

        Returns:
            What to raise instead where the error only says that another rank is gone.
        """
        if self._is_nobodys_business(error):
            return None
        self._times += 1
        step = doing if isinstance(doing, str) else doing()
        board = _Board(f"meshbolt/failures/{self._run}/{self._times}")
        if is_broken_connection(error):
            found = self._ended or self._found(board, step, error)
            setattr(found, _TOLD, True)
            self._part()
            return found
        with suppress(AttributeError):  # of a class with slots
            setattr(error, _TOLD, True)
        with suppress(RuntimeError):  # the rank that keeps the store is gone
            board.write(in_words(error, place=self.place, doing=step))
            if board.all_have_written():
                return None
        self._part()
        with suppress(RuntimeError):
            board.wait_for_readers()
        return None

    def end(self, error: RankError) -> None:
        """End whatever this rank's main thread waits for in other ranks, with an error; to be called from any thread.

        Args:
            error: that `told` raises where the main thread waits.
        """
        if self._run is None or not ranks_are_connected():
            return
        self._ended = error
        board = _Board(f"meshbolt/failures/{self._run}/{self._times + 1}")
        with suppress(RuntimeError):  # the rank that keeps the store is gone
            board.write(in_words(error, place=self.place, doing="a watch"))
        self._part()

    def _is_nobodys_business(self, error: BaseException) -> bool:
        if hasattr(error, _TOLD) or is_met_by_all(error) or not ranks_are_connected() or dist.get_world_size() == 1:
            return True
        if self._run is None:
            self.connect()  # they were for an earlier run; the others are about to begin this one
        return False

    def _part(self) -> None:
        self._attendance.dismiss()
        end_connections(but=self._saving.groups_at_work())

    def _found(self, board: _Board, step: str, error: BaseException) -> RankError:
        words = None
        with suppress(RuntimeError):
            words = board.read()
        if words is not None:
            return RankError(f"{words}\nThis is {self.place}, which waited for it in {step}.")
        found = RankError(
            f"{self.place} waited in {step} for another rank, which is gone or did not answer in time, and has left no word "
            f"({str(error).splitlines()[0]}). If its process was killed, its own output or the launcher's says so. A collective "
            "of your own (torch.distributed, a metric with dist_sync_on_step) waits for ever where only some ranks come to "
            "that line, as in a step of a pipeline: call it in a hook behind the step."
        )
        found.__cause__ = error
        return found


def in_words(error: BaseException, *, place: str, doing: str) -> str:
    """Return what other ranks are told of an error: the rank, the error, and where it was raised.

    Args:
        error: that a rank has met.
        place: the rank.
        doing: what it did.
    """
    what = "".join(traceback.format_exception_only(type(error), error)).strip()
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-_FRAMES))
    return f"{place} failed: {what}\n(in {doing}; what it was doing:)\n{trace}"


def tell_at_exit(failures: Failures, doing: Doing) -> None:
    """Tell the others of an exception that is about to end this process, as nobody has caught it; and show what they have told.

    Args:
        failures: of the run; when it is gone nothing is told.
        doing: what the ranks do together.
    """
    sys.excepthook = functools.partial(_tell_and_show, sys.excepthook, weakref.ref(failures), doing)


def _tell_and_show(
    show: Callable[..., Any],
    failures: weakref.ref[Failures],
    doing: Doing,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    known = failures()
    other = None if known is None else known.tell(error, doing)
    if other is None:
        show(kind, error, trace)
    else:
        show(type(other), other, trace)


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
