"""Two ways to show progress: a panel that is redrawn on a terminal, or lines that stay, in a file."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from meshbolt.callbacks.console import is_terminal, write_line

REDRAWS_PER_SECOND = 4
# A module may log hundreds of metrics for the bar; a panel higher than the terminal could not be redrawn.
MOST_LINES = 5
_BAR_WIDTH = 24
_GAP = "   "
_ERASE = "\r\x1b[J"  # from the beginning of the line to the end of the screen


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is to be shown of one activity.

    Attributes:
        activity: its name, such as "training".
        unit: what is counted.
        done: how many are done.
        total: how many there will be; None where that is not known.
        remaining: the time that is left, in words; empty where that is not known.
        metrics: what was logged, in words.
        rates: speed and memory, in words.
    """

    activity: str
    unit: str
    done: int
    total: int | None
    remaining: str = ""
    metrics: Sequence[str] = field(default_factory=list)
    rates: Sequence[str] = field(default_factory=list)

    @property
    def count(self) -> str:
        """The count in words."""
        return f"{self.unit} {self.done:,}" + (f" of {self.total:,}" if self.total is not None else "")

    @property
    def line(self) -> str:
        """All of it on one line."""
        return " | ".join(
            each for each in (self.activity, self.count, self.remaining, *self.metrics, *self.rates) if each
        )


class Screen(Protocol):
    """Something to show progress on."""

    def is_due(self) -> bool:
        """Return whether enough time has passed to show a status again; what costs time is asked for only then."""

    def show(self, status: Status) -> None:
        """Show a status."""

    def say(self, text: str) -> None:
        """Print a line that stays."""

    def finish(self, activity: str) -> None:
        """Stop showing an activity."""

    def close(self) -> None:
        """Stop drawing."""


def open_screen(*, interval_seconds: float) -> Screen:
    """Return the screen that suits the standard output.

    Args:
        interval_seconds: between lines, where they stay.
    """
    return LiveScreen() if is_terminal() else LineScreen(interval_seconds=interval_seconds)


class LineScreen:
    """Adds a line every few seconds."""

    def __init__(self, *, interval_seconds: float) -> None:
        self._interval_seconds = interval_seconds
        self._next_seconds = monotonic() + interval_seconds

    def is_due(self) -> bool:
        """Return whether the interval is over."""
        return monotonic() >= self._next_seconds

    def show(self, status: Status) -> None:
        """Print a status as one line."""
        self._next_seconds = monotonic() + self._interval_seconds
        self.say(status.line)

    def say(self, text: str) -> None:
        """Print a line, at once even where output is buffered."""
        write_line(text)

    def finish(self, activity: str) -> None:
        """Do nothing: lines stay."""

    def close(self) -> None:
        """Do nothing: lines stay."""


class LiveScreen:
    """Redraws a panel with what is being done, from the thread that trains.

    The cursor waits above the panel, at the beginning of an empty line. So what others write, such as other ranks or handlers of
    logging, is readable and moves the panel down, and neither that nor a window that was made narrower leaves parts of a panel
    behind: all below the cursor is erased before it is drawn again.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, Status] = {}
        # Not rich's own console, which may have been made when the output was another.
        self._console = Console(file=sys.stdout)
        self._next_seconds = 0.0
        self._is_drawn = False
        self._lock = threading.RLock()
        self._streams = {name: _Above(getattr(sys, name), self.erase) for name in _shared_with_the_panel()}
        for name, stream in self._streams.items():
            setattr(sys, name, stream)
        # A program may end where no hook of a callback is called.
        atexit.register(self.close)

    def is_due(self) -> bool:
        """Return whether it is time to redraw."""
        return monotonic() >= self._next_seconds

    def show(self, status: Status) -> None:
        """Redraw a status."""
        self._next_seconds = monotonic() + 1 / REDRAWS_PER_SECOND
        self._statuses[status.activity] = status
        self._draw()

    def say(self, text: str) -> None:
        """Print a line above what is drawn."""
        with self._lock:
            self.erase()
            self._write(f"{text}\n")
            self._draw()

    def finish(self, activity: str) -> None:
        """Take an activity off the screen."""
        if self._statuses.pop(activity, None) is not None:
            self._draw()

    def close(self) -> None:
        """Leave the terminal as it was, with the lines that were said."""
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone, or a stream that was closed
            self.erase()
        for name, stream in self._streams.items():
            if getattr(sys, name) is stream:
                setattr(sys, name, stream.plain)
        atexit.unregister(self.close)

    def erase(self) -> None:
        """Take the panel away until it is drawn again."""
        with self._lock:
            if self._is_drawn:
                self._is_drawn = False
                self._write(_ERASE)

    def _draw(self) -> None:
        with self._lock, self._console.capture() as drawn:
            self._console.print(_Panels(list(self._statuses.values())), end="")
        lines = drawn.get().splitlines()[: max(self._console.height - 2, 0)]
        if any(stream.is_inside_a_line for stream in self._streams.values()):
            self._write("\n")
        for stream in self._streams.values():
            stream.is_inside_a_line = False
        panel = "".join(f"\n{line}" for line in lines)
        self._write(f"{_ERASE}{panel}" + (f"\x1b[{len(lines)}A\r" if lines else ""))
        self._is_drawn = bool(lines)

    def _write(self, text: str) -> None:
        with self._lock:
            stream = self._console.file
            stream.write(text)
            stream.flush()


class _Above:
    """A stream of the terminal that takes the panel away before something is written to it.

    Attributes:
        plain: the stream itself.
        is_inside_a_line: whether what was written last did not end a line.
    """

    def __init__(self, plain: TextIO, erase: Callable[[], None]) -> None:
        self.plain, self.is_inside_a_line = plain, False
        self._erase = erase

    def write(self, text: str) -> int:
        """Write text."""
        self._erase()
        self.is_inside_a_line = not text.endswith("\n") if text else self.is_inside_a_line
        return self.plain.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Be the stream in everything else."""
        return getattr(self.plain, name)


def _shared_with_the_panel() -> list[str]:
    return [name for name in ("stdout", "stderr") if getattr(sys, name) is not None and getattr(sys, name).isatty()]


class _Panels:
    """One panel for each activity, as wide as the terminal is when it is drawn."""

    def __init__(self, statuses: Sequence[Status]) -> None:
        self._statuses = statuses

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the panels."""
        for status in self._statuses:
            # Two columns of the frame at each side.
            yield Panel(
                _content(status, width=max(options.max_width - 4, 1)), title=status.activity, title_align="left"
            )


def _content(status: Status, *, width: int) -> Table:
    rows = Table.grid(expand=True)
    rows.add_column(no_wrap=True, overflow="ellipsis")
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(width=min(_BAR_WIDTH, width // 3))
    head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    head.add_column(justify="right", no_wrap=True)
    head.add_row(
        ProgressBar(total=status.total, completed=status.done), Text(_position(status)), Text(status.remaining)
    )
    rows.add_row(head)
    for items, style in ((status.metrics, "bold"), (status.rates, "")):
        for line in packed(items, width=width, most=MOST_LINES):
            rows.add_row(Text(line, style=style))
    return rows


def _position(status: Status) -> str:
    share = f"{_GAP}{min(status.done / status.total, 1.0):.0%}" if status.total else ""
    return status.count + share


def packed(items: Sequence[str], *, width: int, most: int) -> list[str]:
    """Return lines that hold as many items as fit; none is cut in two, and one that is too long for a line loses its middle.

    Args:
        items: in their order.
        width: of a line, in columns of a terminal.
        most: lines; the last one tells how many items are left out.
    """
    lines: list[list[str]] = []
    for item in (_fitted(item, width) for item in items):
        if lines and cell_len(_GAP.join([*lines[-1], item])) <= width:
            lines[-1].append(item)
        else:
            lines.append([item])
    if len(lines) > most:
        left_out = sum(map(len, lines[most - 1 :]))
        lines = [*lines[: most - 1], [_fitted(f"and {left_out} more", width)]]
    return [_GAP.join(line) for line in lines]


def _fitted(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    tail = (width - 1) // 2
    return set_cell_size(text, width - 1 - tail) + "…" + (text[-tail:] if tail else "")
