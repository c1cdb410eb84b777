"""Choose where stages begin, so that the slowest takes as little time as can be, and the fullest as little memory.

Counted are operations of matrix products and bytes that all operations write, from the step's first line to its last: an
embedding before the first unit belongs to the first stage, a head and the loss to the last. Bytes written also stand for the
activations that a stage keeps for its backward pass; early stages keep those of more microbatches than late ones.

Places are first the model's repeated blocks and its outermost modules. Where these are too few, or stages would be uneven, all
modules are that the step calls once (`survey.py`), and among choices that are nearly as fast the one passes least.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from meshbolt.blocks import find_blocks
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline.analyse import analyse
from meshbolt.pipeline.calls import Calls
from meshbolt.pipeline.cost import Cost, CountCost
from meshbolt.pipeline.plan import CutError, PipelinePlan
from meshbolt.pipeline.survey import Place, survey

_AS_FAST = 1.01
"""A choice whose slowest stage takes no longer than this times that of the fastest choice is as fast."""
_NEARLY_AS_FAST = 1.1
"""The same, where places lie close to each other and differ in what passes them."""
_UNEVEN = 1.25
"""Where the slowest stage has more than this times the mean work, other modules are looked at."""
_WORTH = 1.1
"""How many times faster stages have to be that begin inside of modules."""
_NAMED = 6

Look = Callable[[tuple[str, ...]], CutError | None]


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
    """Return the modules with which stages 1, 2, ... begin, for stages that take the same time, as far as modules allow.

    The step is looked at once to count the work of each unit, what comes before the first and after the last one included, and
    once for each choice until one can be cut.

    Args:
        module: the user's.
        step: runs a microbatch of it.
        stages: how many.
        device: where it computes.
        among: modules with which stages may begin, and the first stage has to have one of them; None: any.
        live: of how many microbatches each stage holds activations at once. Among choices that are as fast, the one is taken
            whose fullest stage holds least; None: it does not matter.
        replicate: names of modules that every stage keeps.

    Raises:
        ConfigError: there are fewer places for a cut than stages need.
        UnsupportedError: the step cannot be cut at all.
    """
    replicate = tuple(replicate)

    def look(cuts: tuple[str, ...]) -> CutError | None:
        return _failure(module, cuts, step, device=device, replicate=replicate)

    calls, counted = Calls(module, (), units=among or (), replicate=replicate), CountCost()
    try:
        whole = analyse(module, calls, step, device=device, cost=counted)
        places = _candidates(whole, calls, among)
    finally:
        calls.remove()
    _check_seen(module, whole, calls)
    end = counted.so_far
    found = _first_that_cuts(
        places, stages, end, look, choose=lambda left: _chosen([each.before for each in left], end, stages, live)
    )
    what = "blocks" if among is not None else "units"
    if among is None and found.slowest * stages > _UNEVEN * end.time:
        inner = _inside(module, step, stages, places, device=device, replicate=replicate, look=look)
        if inner is not None and (found.cuts is None or inner.slowest * _WORTH < found.slowest):
            found, what = inner, "modules"
    if found.cuts is None:
        raise ConfigError(_why_not(module, stages, found, what, whole))
    return found.cuts


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What came of trying places.

    Attributes:
        cuts: the best ones; None: there are too few.
        slowest: how long the slowest stage takes; endless without cuts.
        places: all that were tried.
        refused: by name, why the step cannot be cut at a place.
    """

    cuts: tuple[str, ...] | None
    slowest: float
    places: tuple[Place, ...]
    refused: dict[str, str]


def _first_that_cuts(
    places: Sequence[Place], stages: int, end: Cost, look: Look, *, choose: Callable[[list[Place]], list[int]]
) -> _Found:
    """Choose among places, and without those at which the step cannot be cut, until it can be."""
    left, refused = list(places), dict[str, str]()
    while len(left) >= stages - 1:
        chosen = [left[place] for place in choose(left)]
        cuts = tuple(each.unit for each in chosen)
        failure = look(cuts)
        if failure is None:
            slowest = _slowest([each.before.time for each in chosen], end.time)
            return _Found(cuts=cuts, slowest=slowest, places=tuple(places), refused=refused)
        refused[failure.cut] = str(failure)
        left = [each for each in left if each.unit != failure.cut]
    return _Found(cuts=None, slowest=float("inf"), places=tuple(places), refused=refused)


def _inside(
    module: nn.Module,
    step: Callable[[], Any],
    stages: int,
    outer: Sequence[Place],
    *,
    device: torch.device,
    replicate: tuple[str, ...],
    look: Look,
) -> _Found | None:
    """Choose among all modules; None where they begin nowhere but where the outer ones do."""
    surveyed = survey(module, step, device=device, replicate=replicate)
    known = {each.before for each in outer}
    if all(each.before in known for each in surveyed.places):
        return None
    found = _first_that_cuts(
        surveyed.places, stages, surveyed.end, look, choose=lambda left: _of_least_passing(left, surveyed.end, stages)
    )
    return replace(found, refused={**surveyed.refused, **found.refused})


def _check_seen(module: nn.Module, whole: PipelinePlan, calls: Calls) -> None:
    """Refuse a step that was not looked at as far as the model's blocks.

    Raises:
        UnsupportedError: it was not.
    """
    seen = {call.unit for call in whole.before}
    missed = [name for name in find_blocks(module) if name in calls.units and name not in seen]
    if whole.ended_by and missed:
        raise UnsupportedError(
            f"The step cannot be cut: it could be looked at only as far as {whole.ended_by}, and {missed[0]!r} comes after that. "
            "Code between the units, such as the forward around the layers, runs on every stage, most of which do not have the "
            "values; it cannot branch on them or read them with .item()."
        )


def _why_not(module: nn.Module, stages: int, found: _Found, what: str, whole: PipelinePlan) -> str:
    names = [each.unit for each in found.places]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    looked_at = f" Looked at: {', '.join(names[:_NAMED])}{more}." if names else ""
    why = "".join(f"\n  {name}: {reason}" for name, reason in list(found.refused.items())[:_NAMED])
    if whole.ended_by:
        why += f"\n  The step could be looked at as far as {whole.ended_by}"
    again = [call.unit for call in whole.before if call.number == 1]
    if again:
        twice = f"Called more than once in a step, so that none of them can: {', '.join(again[:_NAMED])}."
        looked_at = f" {twice} If that is the whole model, call it once, on all inputs in one batch.{looked_at}"
    can = sum(name not in found.refused for name in names)
    return (
        f"{type(module).__name__} cannot be cut into {stages} stages: {can} of its {what} can begin one. Use fewer stages, or "
        f"name cuts; a list of layers of one kind is named by blocks='...'.{looked_at}{why}"
    )


def _candidates(plan: PipelinePlan, calls: Calls, among: Collection[str] | None) -> list[Place]:
    """Return the units that a stage may begin with, in their order."""
    often = Counter(call.unit for call in plan.before)
    wanted = [(call.unit, cost) for call, cost in plan.before.items() if among is None or call.unit in among]
    return [
        Place(unit=unit, before=cost, passing=0)
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


def _slowest(starts: Sequence[float], end: float) -> float:
    return max(stop - begin for begin, stop in itertools.pairwise([0.0, *starts, end]))


def _of_least_passing(places: Sequence[Place], end: Cost, stages: int) -> list[int]:
    """Return which places stages begin at: of the choices that are nearly as fast as the fastest, the one that passes least."""
    times = [each.before.time for each in places]
    fastest = balanced(times, end.time, stages)
    limit = _NEARLY_AS_FAST * _slowest([times[place] for place in fastest], end.time)
    edges, passing = [0.0, *times, end.time], [0, *(each.passing for each in places)]

    def passed(_stage: int, begin: int, stop: int) -> float:
        return passing[begin] if edges[stop] - edges[begin] <= limit else float("inf")

    return _least(passed, len(places), stages, join=operator.add)


def _chosen(starts: Sequence[Cost], end: Cost, stages: int, live: Sequence[int] | None) -> list[int]:
    """Return which places stages begin at: the fastest choice, and the one of least memory among those as fast."""
    times = [cost.time for cost in starts]
    fastest = balanced(times, end.time, stages)
    if live is None:
        return fastest
    edges, sizes = [0.0, *times, end.time], [0, *(cost.num_bytes for cost in starts), end.num_bytes]
    limit = _AS_FAST * _slowest([times[place] for place in fastest], end.time)

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


def _least(
    size: Callable[[int, int, int], float], places: int, stages: int, *, join: Callable[[float, float], float] = max
) -> list[int]:
    """Return which places stages begin at, so that the largest stage is as small as can be, or what `join` makes of all.

    Args:
        size: of a stage, by its number and edges: edge 0 is the beginning, edge n + 1 the end, those between are the places.
        places: how many there are.
        stages: at most one more.
        join: of two sizes.
    """
    # best[k][i]: the largest of stages 0 to k if stage k ends at edge i, and the edge at which that one begins.
    best: list[dict[int, tuple[float, int]]] = [{edge: (size(0, 0, edge), 0) for edge in range(1, places + 2)}]
    for stage in range(1, stages):
        before = best[-1]
        best.append(
            {
                edge: min((join(before[begin][0], size(stage, begin, edge)), begin) for begin in range(stage, edge))
                for edge in range(stage + 1, places + 2)
            }
        )
    chosen, edge = list[int](), places + 1
    for row in reversed(best[1:]):
        edge = row[edge][1]
        chosen.append(edge - 1)
    return chosen[::-1]
