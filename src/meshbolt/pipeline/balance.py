"""Choose where stages begin, so that the slowest takes as little time as can be, and the fullest as little memory.

Counted are operations of matrix products and bytes that all operations write, from the step's first line to its last: an
embedding before the first unit belongs to the first stage, a head and the loss to the last. Bytes written also stand for the
activations that a stage keeps for its backward pass; early stages keep those of more microbatches than late ones.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from meshbolt.blocks import find_blocks
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline.analyse import analyse
from meshbolt.pipeline.calls import Calls
from meshbolt.pipeline.cost import Cost, CountCost
from meshbolt.pipeline.plan import CutError, PipelinePlan

_AS_FAST = 1.01
"""A choice whose slowest stage takes no longer than this times that of the fastest choice is as fast."""


def choose_cuts(
    module: nn.Module,
    step: Callable[[], Any],
    stages: int,
    *,
    device: torch.device,
    among: Collection[str] | None = None,
    live: Sequence[int] | None = None,
    replicate: Iterable[str] = (),
) -> tuple[str, ...]:
    """Return the modules with which stages 1, 2, ... begin, for stages that take the same time, as far as units allow.

    The step is looked at once to count the work of each unit, what comes before the first and after the last one included, and
    once for each choice until one can be cut.

    Args:
        module: the user's.
        step: runs a microbatch of it.
        stages: how many.
        device: where it computes.
        among: modules with which stages may begin, and the first stage has to have one of them; None: any unit.
        live: of how many microbatches each stage holds activations at once. Among choices that are as fast, the one is taken
            whose fullest stage holds least; None: it does not matter.
        replicate: names of modules that every stage keeps.

    Raises:
        ConfigError: there are fewer places for a cut than stages need.
        UnsupportedError: the step cannot be cut at all.
    """
    replicate = tuple(replicate)
    calls, counted = Calls(module, (), units=among or (), replicate=replicate), CountCost()
    try:
        whole = analyse(module, calls, step, device=device, cost=counted)
        open_to_cut = _candidates(whole, calls, among)
    finally:
        calls.remove()
    seen = {call.unit for call in whole.before}
    missed = [name for name in find_blocks(module) if name in calls.units and name not in seen]
    if whole.ended_by and missed:
        raise UnsupportedError(
            f"The step cannot be cut: it could be looked at only as far as {whole.ended_by}, and {missed[0]!r} comes after that. "
            "Code between the units, such as the forward around the layers, runs on every stage, most of which do not have the "
            "values; it cannot branch on them or read them with .item()."
        )
    refused: dict[str, str] = {}
    while len(open_to_cut) >= stages - 1:
        chosen = _chosen([cost for _, cost in open_to_cut], counted.so_far, stages, live)
        cuts = tuple(open_to_cut[place][0] for place in chosen)
        failure = _failure(module, cuts, step, device=device, replicate=replicate)
        if failure is None:
            return cuts
        refused[failure.cut] = str(failure)
        open_to_cut = [(name, cost) for name, cost in open_to_cut if name != failure.cut]
    why = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
    if whole.ended_by:
        why += f"\n  The step could be looked at as far as {whole.ended_by}"
    what = "units" if among is None else "blocks"
    raise ConfigError(
        f"{type(module).__name__} cannot be cut into {stages} stages: {len(open_to_cut)} of its {what} can begin one. Use fewer "
        "stages, or name cuts; a list of layers of one kind is named by blocks='...'. A module that a step calls twice can "
        f"begin none.{why}"
    )


def _candidates(plan: PipelinePlan, calls: Calls, among: Collection[str] | None) -> list[tuple[str, Cost]]:
    """Return the units that a stage may begin with, in their order, and how much work lies before each."""
    often = Counter(call.unit for call in plan.before)
    wanted = [(call.unit, cost) for call, cost in plan.before.items() if among is None or call.unit in among]
    return [
        (unit, cost)
        for unit, cost in wanted[1:]
        if often[unit] == 1 and next(calls.units[unit].parameters(), None) is not None and not calls.is_replicated(unit)
    ]


def _failure(
    module: nn.Module, cuts: tuple[str, ...], step: Callable[[], Any], *, device: torch.device, replicate: Iterable[str]
) -> CutError | None:
    calls = Calls(module, cuts, replicate=replicate)
    try:
        analyse(module, calls, step, device=device)
    except CutError as error:
        return error
    finally:
        calls.remove()
    return None


def _chosen(starts: Sequence[Cost], end: Cost, stages: int, live: Sequence[int] | None) -> list[int]:
    """Return which places stages begin at: the fastest choice, and the one of least memory among those as fast."""
    times = [cost.time for cost in starts]
    fastest = balanced(times, end.time, stages)
    if live is None:
        return fastest
    edges, sizes = [0.0, *times, end.time], [0, *(cost.num_bytes for cost in starts), end.num_bytes]
    chosen = [0, *(place + 1 for place in fastest), len(edges) - 1]
    limit = _AS_FAST * max(edges[stop] - edges[begin] for begin, stop in itertools.pairwise(chosen))

    def held(stage: int, begin: int, stop: int) -> float:
        return live[stage] * (sizes[stop] - sizes[begin]) if edges[stop] - edges[begin] <= limit else float("inf")

    return _least(held, len(starts), stages)


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
    edges = [0.0, *starts, end]
    return _least(lambda _stage, begin, stop: edges[stop] - edges[begin], len(starts), stages)


def _least(size: Callable[[int, int, int], float], places: int, stages: int) -> list[int]:
    """Return which places stages begin at, so that the largest stage is as small as can be.

    Args:
        size: of a stage, by its number and edges: edge 0 is the beginning, edge n + 1 the end, those between are the places.
        places: how many there are.
        stages: at most one more.
    """
    # best[k][i]: the largest of stages 0 to k if stage k ends at edge i, and the edge at which that one begins.
    best: list[dict[int, tuple[float, int]]] = [{edge: (size(0, 0, edge), 0) for edge in range(1, places + 2)}]
    for stage in range(1, stages):
        before = best[-1]
        best.append(
            {
                edge: min((max(before[begin][0], size(stage, begin, edge)), begin) for begin in range(stage, edge))
                for edge in range(stage + 1, places + 2)
            }
        )
    chosen, edge = list[int](), places + 1
    for row in reversed(best[1:]):
        edge = row[edge][1]
        chosen.append(edge - 1)
    return chosen[::-1]
