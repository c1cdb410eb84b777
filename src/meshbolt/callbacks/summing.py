"""Sums over all ranks that nobody waits for: asked for after one step, begun after the next one, there after a later one.

Whoever wants a sum after the same step shares one small collective with all others who do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from meshbolt.callbacks.moment import Moment

Numbers = Callable[[], Mapping[str, float]]
Tell = Callable[[Moment, Mapping[str, float]], None]


class SharedSums:
    """Adds up numbers of all ranks in the background, those of all who take part in one collective.

    All ranks must take part, want sums after the same steps, and leave. Without other ranks, a sum is there at once.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._asked: tuple[list[Part], torch.Tensor, Any] | None = None
        self._group: dist.ProcessGroup | None = None
        self._after = -1
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1

    def join(self, names: Sequence[str], tell: Tell) -> Part:
        """Take part; all ranks call it together.

        Args:
            names: of the numbers.
            tell: is called with what a sum is about, and the sums by name, when they are there.
        """
        if self._group is None and self.ranks > 1:
            # Through the hosts: a collective of the devices would have to be waited for there.
            gloo = dist.get_backend() == "gloo"
            self._group = dist.group.WORLD if gloo else dist.new_group(backend="gloo")
        self._parts.append(part := Part(self, names, tell))
        return part

    @property
    def oldest(self) -> Moment | None:
        """What the oldest sum is about that is wanted and is not there yet; None where there is none."""
        asked = [] if self._asked is None else [part.asked for part in self._asked[0]]
        moments = [moment for moment in [*asked, *(part.wanted for part in self._parts)] if moment is not None]
        return min(moments, key=lambda moment: moment.logger_step, default=None)

    def go_on(self, step: int) -> None:
        """Tell of sums that are there, and begin those that were wanted in the step before; once a step, whoever calls first.

        Args:
            step: that has ended.
        """
        if step == self._after:
            return
        self._after = step
        self._tell()
        if any(part.wanted for part in self._parts):
            self._tell(wait=True)
            self._begin()

    def left(self) -> None:
        """Begin the last sums and wait for them, if all have left by now; all ranks call it together."""
        if not all(part.has_left for part in self._parts):
            return
        self._tell(wait=True)
        self._begin()
        self._tell(wait=True)
        if self._group is not None and self._group is not dist.group.WORLD:
            dist.destroy_process_group(self._group)
        self._group = None
        self._parts.clear()

    def _begin(self) -> None:
        parts = [part for part in self._parts if part.wanted]
        if not parts:
            return
        values = torch.tensor([number for part in parts for number in part.take()], dtype=torch.float64)
        work = dist.all_reduce(values, group=self._group, async_op=True) if self._group is not None else None
        self._asked = parts, values, work

    def _tell(self, *, wait: bool = False) -> None:
        if self._asked is None:
            return
        parts, values, work = self._asked
        if work is not None:
            if not wait and not work.is_completed():
                return
            work.wait()
        self._asked = None
        sums = iter(values.tolist())
        for part in parts:
            part.tell(sums)


class Part:
    """What one takes part with; see `SharedSums.join`.

    Attributes:
        wanted: what the sum is about that is not begun yet.
        asked: what the sum is about that is under way.
        has_left: it wants no more.
    """

    def __init__(self, sums: SharedSums, names: Sequence[str], tell: Tell) -> None:
        self._sums, self._names, self._tell = sums, tuple(names), tell
        self._numbers: Numbers | None = None
        self.wanted: Moment | None = None
        self.asked: Moment | None = None
        self.has_left = False

    @property
    def ranks(self) -> int:
        """Over how many ranks it adds up."""
        return self._sums.ranks

    def want(self, about: Moment, numbers: Numbers) -> None:
        """Have numbers added up: begun when the step after this one has ended, whoever notices that first.

        Args:
            about: the moment that they are of.
            numbers: returns this rank's, by name, when the sum begins.
        """
        self.wanted, self._numbers = about, numbers

    def go_on(self, step: int) -> None:
        """Let sums go on, after a step of that number."""
        self._sums.go_on(step)

    def leave(self) -> None:
        """Want no more; what was wanted last is told of before the last one's `leave` returns."""
        self.has_left = True
        self._sums.left()

    def take(self) -> list[float]:
        """Return the numbers that are wanted, in their order."""
        if self._numbers is None:
            raise AssertionError("Numbers are taken that nobody wants.")
        numbers = self._numbers()
        self.asked, self.wanted, self._numbers = self.wanted, None, None
        return [numbers[name] for name in self._names]

    def tell(self, sums: Any) -> None:
        """Tell of sums.

        Args:
            sums: an iterator, of which this part's are the next.
        """
        about, self.asked = self.asked, None
        if about is None:
            raise AssertionError("Sums are told of that nobody has asked for.")
        self._tell(about, {name: next(sums) for name in self._names})
