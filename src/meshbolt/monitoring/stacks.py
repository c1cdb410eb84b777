"""What every thread of this process is doing, as lines of Python."""

from __future__ import annotations

import sys
import sysconfig
import threading
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_FRAMES = 40
_PACKAGE = str(Path(__file__).parents[1])
_EXCHANGES = ("/torch/distributed/", f"{_PACKAGE}/collectives/", f"{_PACKAGE}/tensor/", f"{_PACKAGE}/pipeline/")
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@dataclass(frozen=True)
class ThreadStack:
    """One thread.

    Attributes:
        name: of the thread.
        lines: of its stack, the innermost call last.
        place: file and line of the innermost call in code that is neither a library's nor ours; empty where there is none.
        waits: whether the innermost call is in code that exchanges between ranks.
    """

    name: str
    lines: tuple[str, ...]
    place: str = ""
    waits: bool = False


def current_stacks(*, but: Collection[int] = ()) -> list[ThreadStack]:
    """Return the stacks of all threads of this process that run Python, the main one first.

    Args:
        but: identifiers of threads to leave out.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda each: each[0] != main)
    stacks = []
    for number, frame in frames:
        if number not in but:
            summary = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=_FRAMES)
            summary.reverse()
            lines = [line for each in summary.format() for line in each.rstrip("\n").splitlines()]
            waits = bool(summary) and any(part in summary[-1].filename for part in _EXCHANGES)
            stacks.append(ThreadStack(names.get(number, f"thread {number}"), tuple(lines), _place(summary), waits))
    return stacks


def _place(summary: traceback.StackSummary) -> str:
    for frame in reversed(summary):
        if not frame.filename.startswith((*_LIBRARIES, _PACKAGE, "<")):
            return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
    return ""
