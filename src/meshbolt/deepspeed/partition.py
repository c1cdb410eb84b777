"""Divide layers among stages at the places where DeepSpeed does, so that a script's stages hold what they held there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Return where each part begins, and the end: as many items in each, and one more in the first ones where some are left.

    Args:
        num_items: as many as parts or more.
        num_parts: of them.

    Example:
        >>> partition_uniform(8, 3)
        [0, 3, 6, 8]
    """
    least, rest = divmod(num_items, num_parts)
    sizes = [least + int(part < rest) for part in range(num_parts)]
    return [0, *itertools.accumulate(sizes)]


def partition_balanced(weights: Sequence[int], num_parts: int) -> list[int]:
    """Return where each part begins, and the end: with the smallest difference between the heaviest part and the lightest.

    The best division of the first items into fewer parts is taken for that of all, as DeepSpeed has it.

    Args:
        weights: of the items, in their order; as many as parts or more.
        num_parts: of them.

    Example:
        >>> partition_balanced([5, 1, 1, 5], 2)
        [0, 2, 4]
    """
    if len(weights) <= num_parts:
        return partition_uniform(len(weights), num_parts)
    sums = [0, *itertools.accumulate(weights)]
    # Of the first `end` items: the heaviest part, the lightest, and where the last one begins.
    before: dict[int, tuple[float, float]] = {0: (0, math.inf)}
    begins: list[dict[int, int]] = []
    for part in range(1, num_parts + 1):
        best: dict[int, tuple[float, float]] = {}
        start_of: dict[int, int] = {}
        for end in range(part, len(weights) + 1):
            lowest = math.inf
            for start in (start for start in before if start < end):
                weight = sums[end] - sums[start]
                heaviest, lightest = max(before[start][0], weight), min(before[start][1], weight)
                if heaviest - lightest <= lowest:  # of equal ones the last
                    lowest, best[end], start_of[end] = heaviest - lightest, (heaviest, lightest), start
        before = best
        begins.append(start_of)
    parts = [len(weights)]
    for start_of in reversed(begins):
        parts.append(start_of[parts[-1]])
    return parts[::-1]
