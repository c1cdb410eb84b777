"""That everything ends: a signal, or the loss of whoever has started this, leaves no process after a time of grace.

torchrun passes a signal on to its ranks from its main thread, which comes to that only where it does not wait in native code,
and waits for ranks that do not come. So a thread watches over it, which nothing keeps from its work.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

ALIVE, INTERRUPT, END = b".", b"I", b"T"
"""What is sent along a lifeline: nothing but being there, an interrupt from the keyboard, and the end."""
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_LAST_SECONDS = 2.0
_OVER, _NONE = 0, -1


@contextmanager
def surely_ending(*, grace_seconds: float) -> Iterator[None]:
    """See to it that this process and all it has started are gone some time after the first signal; at once after a second.

    Args:
        grace_seconds: that ranks have to end by themselves.
    """
    arrived, sent = os.pipe()
    os.set_blocking(sent, False)
    before = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(arrived, grace_seconds), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(sent)
        thread.join()
        os.close(arrived)


def _watch(arrived: int, grace_seconds: float) -> None:
    number = _next_signal(arrived, None)
    if number == _OVER or _next_signal(arrived, grace_seconds) == _OVER:
        return
    kill_children()
    if _next_signal(arrived, _LAST_SECONDS) != _OVER:
        os._exit(128 + number)


def _next_signal(arrived: int, seconds: float | None) -> int:
    """Return the next signal that ends a run; `_OVER` where nobody is left to be watched; `_NONE` when the time is over."""
    until = None if seconds is None else time.monotonic() + seconds
    while select.select([arrived], [], [], None if until is None else max(0.0, until - time.monotonic()))[0]:
        read = os.read(arrived, 1)
        if not read:
            return _OVER
        if read[0] in _SIGNALS:
            return read[0]
    return _NONE


def kill_children() -> None:
    """Kill all that this process has started, and what those have."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.Error):
            child.kill()


def hold_on_to(lifeline: int) -> None:
    """End this process, as a signal does, when whoever holds the other end of a pipe says so, closes it, or falls silent.

    Args:
        lifeline: file descriptor of the pipe.
    """
    threading.Thread(target=_listen, args=(lifeline,), daemon=True).start()


def _listen(lifeline: int) -> None:
    number = signal.SIGTERM
    while select.select([lifeline], [], [], SILENCE_SECONDS)[0]:
        read = os.read(lifeline, 64)
        if INTERRUPT in read:
            number = signal.SIGINT
        if not read or read.strip(ALIVE):
            break
    os.kill(os.getpid(), number)
