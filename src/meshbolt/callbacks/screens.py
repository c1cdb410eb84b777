"""Two ways to show progress: one line that is redrawn on a terminal, or lines that stay, in a file."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from meshbolt.callbacks.console import is_terminal, write_line

REDRAWS_PER_SECOND = 4


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is to be shown of one activity.

    Attributes:
        activity: its name, such as "training".
        unit: what is counted.
        done: how many are done.
        total: how many there will be; None where that is not known.
        details: metrics and rates, in words.
    """

    activity: str
    unit: str
    done: int
    total: int | None
    details: list[str]

    @property
    def count(self) -> str:
        """The count in words."""
        return f"{self.unit} {self.done}" + (f" of {self.total}" if self.total is not None else "")


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
        self.say(" | ".join([status.activity, status.count, *status.details]))

    def say(self, text: str) -> None:
        """Print a line, at once even where output is buffered."""
        write_line(text)

    def finish(self, activity: str) -> None:
        """Do nothing: lines stay."""

    def close(self) -> None:
        """Do nothing: lines stay."""


class LiveScreen:
    """Redraws one line per activity in place, from the thread that trains."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}", markup=False),
            # Not rich's own, which may have been made when the output was another.
            console=Console(),
            auto_refresh=False,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._next_seconds = 0.0
        self._bars.start()

    def is_due(self) -> bool:
        """Return whether it is time to redraw."""
        return monotonic() >= self._next_seconds

    def show(self, status: Status) -> None:
        """Redraw a status."""
        self._next_seconds = monotonic() + 1 / REDRAWS_PER_SECOND
        if status.activity not in self._tasks:
            self._tasks[status.activity] = self._bars.add_task(status.activity, text="")
        text = " | ".join([status.count, *status.details])
        self._bars.update(self._tasks[status.activity], completed=status.done, total=status.total, text=text)
        self._bars.refresh()

    def say(self, text: str) -> None:
        """Print a line above what is drawn."""
        self._bars.console.print(text, markup=False, highlight=False)

    def finish(self, activity: str) -> None:
        """Take an activity off the screen."""
        if activity in self._tasks:
            self._bars.remove_task(self._tasks.pop(activity))
            self._bars.refresh()

    def close(self) -> None:
        """Leave the terminal as it was, with the lines that were said."""
        self._bars.stop()
