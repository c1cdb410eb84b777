"""Curves of any length in little room: for each stretch of steps the lowest, the highest and the mean value.

A curve that is thinned by leaving points out hides the one step whose loss jumped; here every value is inside of what is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_STRETCHES = 300


@dataclass
class Stretch:
    """Values of neighbouring steps.

    Attributes:
        first: step.
        last: step.
        count: of values that are finite.
        total: their sum.
        lowest: of them.
        highest: of them.
    """

    first: int
    last: int
    count: int = 0
    total: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf

    @property
    def mean(self) -> float:
        """The mean of the finite values; NaN where there is none."""
        return self.total / self.count if self.count else math.nan

    def add(self, step: int, value: float) -> None:
        """Take a value in; one that is not finite leaves its place empty.

        Args:
            step: of the optimizer.
            value: of it.
        """
        self.first, self.last = min(self.first, step), max(self.last, step)
        if math.isfinite(value):
            self.count += 1
            self.total += value
            self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)

    def join(self, other: Stretch) -> None:
        """Take in the values of another stretch."""
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.count += other.count
        self.total += other.total
        self.lowest, self.highest = min(self.lowest, other.lowest), max(self.highest, other.highest)


class Envelope:
    """A curve that is added to value by value, in any order, and never takes more room than its stretches.

    Args:
        most: stretches.
    """

    def __init__(self, most: int = MOST_STRETCHES) -> None:
        self._most, self._width = most, 1
        self._stretches: dict[int, Stretch] = {}
        self.num_values = 0
        self.num_not_finite = 0
        self.first_not_finite: int | None = None
        self.last: tuple[int, float] | None = None
        self.lowest: tuple[int, float] | None = None
        self.highest: tuple[int, float] | None = None

    def add(self, step: int, value: float) -> None:
        """Add a value.

        Args:
            step: of the optimizer.
            value: any float.
        """
        self.num_values += 1
        self._note(step, value)
        place = step // self._width
        if place not in self._stretches:
            self._stretches[place] = Stretch(step, step)
        self._stretches[place].add(step, value)
        while len(self._stretches) > self._most:
            self._halve()

    @property
    def is_thinned(self) -> bool:
        """Whether a stretch stands for several steps."""
        return self._width > 1

    def stretches(self) -> list[Stretch]:
        """Return the stretches in the order of their steps."""
        return [self._stretches[place] for place in sorted(self._stretches)]

    def _note(self, step: int, value: float) -> None:
        if self.last is None or step >= self.last[0]:
            self.last = step, value
        if not math.isfinite(value):
            self.num_not_finite += 1
            self.first_not_finite = step if self.first_not_finite is None else min(step, self.first_not_finite)
            return
        if self.lowest is None or value < self.lowest[1]:
            self.lowest = step, value
        if self.highest is None or value > self.highest[1]:
            self.highest = step, value

    def _halve(self) -> None:
        self._width *= 2
        joined: dict[int, Stretch] = {}
        for place, stretch in self._stretches.items():
            if place // 2 in joined:
                joined[place // 2].join(stretch)
            else:
                joined[place // 2] = stretch
        self._stretches = joined
