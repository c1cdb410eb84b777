"""Choose where stages begin, so that the slowest takes as little time as can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from meshbolt.errors import ConfigError
from meshbolt.pipeline.analyse import analyse
from meshbolt.pipeline.calls import Calls
from meshbolt.pipeline.cost import CountCost
from meshbolt.pipeline.plan import CutError, PipelinePlan


def choose_cuts(module: nn.Module, step: Callable[[], Any], stages: int, *, device: torch.device) -> tuple[str, ...]:
    """Return the modules with which stages 1, 2, ... begin, for stages that take the same time, as far as units allow.

    The step is looked at once to count the work of each unit, what comes before the first and after the last one included, and
    once for each choice until one can be cut.

    Args:
        module: the user's.
        step: runs a microbatch of it.
        stages: how many.
        device: where it computes.

    Raises:
        ConfigError: there are fewer places for a cut than stages need.
        UnsupportedError: the step cannot be cut at all.
    """
    calls, counted = Calls(module, ()), CountCost()
    try:
        whole = analyse(module, calls, step, device=device, cost=counted)
        open_to_cut = _candidates(whole, calls)
    finally:
        calls.remove()
    refused: dict[str, str] = {}
    while len(open_to_cut) >= stages - 1:
        starts, end = [time for _, time in open_to_cut], counted.so_far.time
        cuts = tuple(open_to_cut[place][0] for place in balanced(starts, end, stages))
        failure = _failure(module, cuts, step, device=device)
        if failure is None:
            return cuts
        refused[failure.cut] = str(failure)
        open_to_cut = [(name, time) for name, time in open_to_cut if name != failure.cut]
    why = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
    if whole.ended_by:
        why += f"\n  The step could be looked at as far as {whole.ended_by}"
    raise ConfigError(
        f"{type(module).__name__} cannot be cut into {stages} stages: {len(open_to_cut)} of its units can begin one. Use fewer "
        f"stages, or name cuts.{why}"
    )


def _candidates(plan: PipelinePlan, calls: Calls) -> list[tuple[str, float]]:
    """Return the units that a stage may begin with, in their order, and how much work lies before each."""
    often = Counter(call.unit for call in plan.before)
    return [
        (call.unit, cost.time)
        for call, cost in list(plan.before.items())[1:]
        if often[call.unit] == 1 and next(calls.units[call.unit].parameters(), None) is not None
    ]


def _failure(
    module: nn.Module, cuts: tuple[str, ...], step: Callable[[], Any], *, device: torch.device
) -> CutError | None:
    calls = Calls(module, cuts)
    try:
        analyse(module, calls, step, device=device)
    except CutError as error:
        return error
    finally:
        calls.remove()
    return None


def balanced(starts: Sequence[float], end: float, stages: int) -> list[int]:
    """Return which of the places in a row stages begin at, so that the longest stage is as short as can be.

    Args:
        starts: how much work lies before each place, not falling.
        end: all work.
        stages: at most one more than there are places.

    Example:
        >>> balanced([10, 20, 30, 40], 90, 2)
        [3]
    """
    # best[k][i]: the longest of the k stages before place i, which is where the next one begins, and where the k-th began.
    best: list[list[tuple[float, int]]] = [[(start, -1) for start in starts]]
    for count in range(2, stages):
        row = [(float("inf"), -1)] * len(starts)
        for place in range(count - 1, len(starts)):
            row[place] = min(
                (max(best[-1][before][0], starts[place] - starts[before]), before) for before in range(count - 2, place)
            )
        best.append(row)
    if stages == 1:
        return []
    place = min(range(stages - 2, len(starts)), key=lambda index: max(best[-1][index][0], end - starts[index]))
    chosen = [place]
    for row in reversed(best[1:]):
        place = row[place][1]
        chosen.append(place)
    return chosen[::-1]
