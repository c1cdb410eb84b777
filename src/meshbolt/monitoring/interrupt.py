"""Raising an error in the main thread while it waits, and getting at the stacks of a process that runs no Python.

One signal does both. Its default is to be ignored, so that one that comes too late or too early does no harm.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

_PATIENCE_SECONDS = 2.0
_TICK_SECONDS = 0.05
_SIGNAL = getattr(signal, "SIGURG", None)


class Interrupt:
    """Made and removed in the main thread; of any other thread's making it can do nothing, and says so.

    Attributes:
        works: whether it can interrupt.
        has_raised: set when the error has been raised in the main thread.
        stacks_file: into which this process writes the stack of its main thread when it gets the signal.
    """

    def __init__(self) -> None:
        self.works = _SIGNAL is not None and threading.current_thread() is threading.main_thread()
        self.has_raised = threading.Event()
        self.stacks_file = ""
        self._error: BaseException | None = None
        self._main = threading.main_thread().ident
        self._file: TextIO | None = None
        self._before: Any = None
        if self.works and _SIGNAL is not None:
            self._before = signal.signal(_SIGNAL, self._handle)
            descriptor, self.stacks_file = tempfile.mkstemp(prefix="meshbolt-stacks-")
            self._file = os.fdopen(descriptor, "w")
            # It needs no lock of Python's, and hands the signal on to the handler above. Of other threads it must not read
            # the stacks, which change meanwhile.
            faulthandler.register(_SIGNAL, file=self._file, all_threads=False, chain=True)

    def raise_in_main(self, error: BaseException) -> None:
        """Raise an error in the main thread, as soon as that runs Python or is in a call that a signal ends, such as a sleep.

        Args:
            error: to raise.
        """
        self._error = error
        if self.works and _SIGNAL is not None and self._main is not None:
            signal.pthread_kill(self._main, _SIGNAL)

    def remove(self) -> None:
        """Put back what there was; again, it does nothing."""
        self._error = None
        if self._file is None or _SIGNAL is None:
            return
        faulthandler.unregister(_SIGNAL)
        if signal.getsignal(_SIGNAL) == self._handle and threading.current_thread() is threading.main_thread():
            signal.signal(_SIGNAL, self._before if self._before is not None else signal.SIG_DFL)
        self._file.close()
        self._file = None
        with contextlib.suppress(OSError):
            Path(self.stacks_file).unlink()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        error, self._error = self._error, None
        if error is not None:
            self.has_raised.set()
            raise error


def stacks_of_other(pid: int, stacks_file: str) -> str:
    """Return the stack of another process of this machine, which may hold Python's lock; empty where it gives none.

    Args:
        pid: of the process.
        stacks_file: its `Interrupt.stacks_file`.
    """
    if not stacks_file or _SIGNAL is None:
        return ""
    path, text, until = Path(stacks_file), "", time.monotonic() + _PATIENCE_SECONDS
    try:
        begin = path.stat().st_size
        os.kill(pid, _SIGNAL)
        while time.monotonic() < until:
            time.sleep(_TICK_SECONDS)
            before, text = text, path.read_bytes()[begin:].decode(errors="replace")
            if text and text == before:
                break
    except OSError:  # it is gone meanwhile, or another user's
        return ""
    return text
