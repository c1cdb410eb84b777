"""What offloading has moved so far, how long that took, and how much of it nothing hid, in running totals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

# Told what was done from one moment to another, on the clock of `time.perf_counter`: a lane ("file: read", ...), what it was, and
# when it began and ended, in seconds. Called from any thread.
Observer = Callable[[str, str, float, float], None]

T = TypeVar("T", bound="_Totals")


class _Totals:
    """Numbers that can be added and subtracted, each for itself."""

    def __add__(self: T, other: T) -> T:
        """Return the sum of each number."""
        return type(self)(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in _fields(self)})

    def __sub__(self: T, earlier: T) -> T:
        """Return what came after an earlier moment."""
        return type(self)(
            **{each.name: getattr(self, each.name) - getattr(earlier, each.name) for each in _fields(self)}
        )


@dataclass(frozen=True)
class Moved(_Totals):
    """What went one way.

    Attributes:
        num_bytes: that updates took from there or put there. In a step it is the same as in the next one.
        done_bytes: that have arrived. It runs ahead of what updates have taken, and behind what they have put.
        seconds: in which some of these were on their way.
    """

    num_bytes: int = 0
    done_bytes: int = 0
    seconds: float = 0.0

    @property
    def bytes_per_second(self) -> float | None:
        """While something was moving; None: nothing was."""
        return self.done_bytes / self.seconds if self.seconds > 0 else None


NOTHING = Moved()


@dataclass(frozen=True, kw_only=True)
class Ways(_Totals):
    """What went each way.

    Attributes:
        to_host: from a GPU to host memory.
        to_device: from host memory to a GPU.
        read: from a file.
        written: to a file.
    """

    to_host: Moved = NOTHING
    to_device: Moved = NOTHING
    read: Moved = NOTHING
    written: Moved = NOTHING


@dataclass(frozen=True, kw_only=True)
class OffloadTraffic(_Totals):
    """Running totals of one rank; the difference of two is what came between them.

    Attributes:
        state: what updates moved: gradients to the host, updated parameters to the device, state from and to a file.
        parameters: likewise, parameters that lie elsewhere while nobody computes with them.
        updated: state that was updated, and how long the host's threads took.
        busy_seconds: that the threads of updates worked, with their own waiting for gradients and files: what there is to hide.
        step_wait_seconds: that a step waited for its updates.
        forward_wait_seconds: that layers waited for their parameters before they ran.
        other_wait_seconds: that somebody else waited: a checkpoint, a norm, an average.
        read_wait_seconds: of the busy ones, that updates waited for a file to be read.
        room_wait_seconds: of the busy ones, that updates waited for a buffer which was still being written.
        gather_wait_seconds: that gathers waited for parameters to be read from their file.
    """

    state: Ways = Ways()
    parameters: Ways = Ways()
    updated: Moved = NOTHING
    busy_seconds: float = 0.0
    step_wait_seconds: float = 0.0
    forward_wait_seconds: float = 0.0
    other_wait_seconds: float = 0.0
    read_wait_seconds: float = 0.0
    room_wait_seconds: float = 0.0
    gather_wait_seconds: float = 0.0

    @property
    def not_hidden_seconds(self) -> float:
        """How long the run waited for updates, which nothing hid."""
        return self.step_wait_seconds + self.forward_wait_seconds + self.other_wait_seconds

    @property
    def hidden_fraction(self) -> float | None:
        """The part of the updates' time that other work hid, 0 to 1; None: there was none."""
        if self.busy_seconds <= 0:
            return None
        return max(0.0, 1.0 - self.not_hidden_seconds / self.busy_seconds)

    def moved(self) -> Iterator[tuple[str, Moved]]:
        """Yield the name of each way, such as "state_read", and what went it."""
        for kind in ("state", "parameters"):
            ways = getattr(self, kind)
            for way in _fields(ways):
                yield f"{kind}_{way.name}", getattr(ways, way.name)


def _fields(totals: _Totals) -> Any:
    return fields(totals)  # type: ignore[arg-type]
