"""After an exception: find out whether all ranks have met one, before anything is asked of them together.

An error on one rank leaves the others in the middle of a step, where they wait for this rank until the timeout. Whatever needs
all ranks, such as a checkpoint that a callback saves on an exception, would hang on this rank too, or pair with collectives it
was not meant for. So the ranks that have met an exception call their names first, in the store through which they once found
each other: a rank that is still at work does not answer, and after a short while the others go home.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from meshbolt.strategies.compat import default_store

_ALL, _CLOSED = b"all", b"closed"
_SHARE_OF_TIMEOUT = 0.1
_LONGEST_WAIT = timedelta(seconds=30)

_log = logging.getLogger(__name__)


class Attendance:
    """The roll call among the ranks of the default process group; once for each exception."""

    def __init__(self, *, timeout: timedelta) -> None:
        """Prepare.

        Args:
            timeout: how long a collective waits; a roll call takes a tenth of it, and at most half a minute.
        """
        self._timeout = timeout
        self._patience = min(timeout * _SHARE_OF_TIMEOUT, _LONGEST_WAIT)
        self._number = 0
        self._was_called = False
        self._group: dist.ProcessGroup | None = None

    def forget(self) -> None:
        """Begin a new run: what was found out in an earlier one counts no more."""
        self._was_called, self._group = False, None

    def dismiss(self) -> None:
        """Do nothing more together."""
        self._was_called, self._group = True, None

    def group(self, *, steps: int, stays_away: Callable[[], bool] = lambda: False) -> dist.ProcessGroup | None:
        """Return a group of all ranks, over which they can act together; None where they are not all here.

        A fresh one, because the exception may have left the default group with messages that nobody has read.

        Args:
            steps: optimizer steps taken; ranks that differ hold weights of different steps, which do not belong together.
            stays_away: asked first: whether this rank has nothing to do with the others any more.
        """
        if not self._was_called:
            self._was_called = True
            if stays_away():
                return None
            self._number += 1
            self._group = self._call(f"meshbolt/exception/{self._number}/{steps}")
        return self._group

    def _call(self, prefix: str) -> dist.ProcessGroup | None:
        if not self._all_are_here(prefix):
            _log.warning(
                "An exception ended the run on this rank, and other ranks did not meet one at the same step within %.1f s: "
                "nothing that needs all ranks is done any more, such as saving a checkpoint.",
                self._patience.total_seconds(),
            )
            return None
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=self._timeout)
        return group

    def _all_are_here(self, prefix: str) -> bool:
        try:
            return self._verdict(default_store(), prefix)
        except RuntimeError:  # the rank that keeps the store is gone
            return False

    def _verdict(self, store: Any, prefix: str) -> bool:
        verdict = f"{prefix}/verdict"
        if store.add(f"{prefix}/present", 1) == dist.get_world_size():
            return bool(store.compare_set(verdict, "", _ALL.decode()) == _ALL)
        try:
            store.wait([verdict], self._patience)
        except RuntimeError:  # stores have several classes for it; too late for those who come now
            return bool(store.compare_set(verdict, "", _CLOSED.decode()) == _ALL)
        return bool(store.get(verdict) == _ALL)
