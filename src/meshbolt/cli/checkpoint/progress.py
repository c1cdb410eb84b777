"""How far a command is: a bar on a terminal, a line every few seconds in a log, nothing where a program reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from meshbolt.callbacks.screens import Status, open_screen
from meshbolt.checkpoint.formats import Watch
from meshbolt.units import MIB, format_bytes

_INTERVAL_SECONDS = 5.0


@contextmanager
def watched(activity: str, *, show: bool) -> Iterator[Watch]:
    """Yield a watch whose bytes are shown.

    Args:
        activity: what is done.
        show: False shows nothing.
    """
    if not show:
        yield Watch()
        return
    screen, begin, done, total = open_screen(interval_seconds=_INTERVAL_SECONDS), monotonic(), 0, 0

    def on_total(num_bytes: int) -> None:
        nonlocal total
        total = num_bytes

    def on_bytes(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if screen.is_due():
            speed = done / max(monotonic() - begin, 1e-3)
            # What is beside the tensors is known only roughly before.
            whole = max(done, total) // MIB if total else None
            status = Status(
                activity=activity, unit="MiB", done=done // MIB, total=whole, rates=[f"{format_bytes(speed)}/s"]
            )
            screen.show(status)

    try:
        yield Watch(on_total=on_total, on_bytes=on_bytes)
    finally:
        screen.finish(activity)
        screen.close()
