"""All places where a step might be cut, for models whose repeated blocks and outermost modules do not serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meshbolt.blocks import find_blocks
from meshbolt.pipeline.analyse import analyse, passing_bytes
from meshbolt.pipeline.calls import Calls
from meshbolt.pipeline.cost import Cost, CountCost
from meshbolt.pipeline.plan import CutError

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A module with which a stage may begin.

    Attributes:
        unit: its name.
        before: how much work lies before its call.
        passing: bytes that pass the cut in front of it.
    """

    unit: str
    before: Cost
    passing: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found in a step.

    Attributes:
        places: where it can be cut, in the order of their calls, no two at the same place.
        end: all work.
        refused: by name, why it cannot be cut at a module.
    """

    places: tuple[Place, ...]
    end: Cost
    refused: dict[str, str]


def survey(module: nn.Module, step: Callable[[], Any], *, device: torch.device, replicate: tuple[str, ...]) -> Survey:
    """Return all places where a step can be cut, looking into every module that is no repeated block.

    Args:
        module: the user's, whole or on meta.
        step: runs a microbatch of it.
        device: where it computes.
        replicate: names of modules that every stage keeps.

    Raises:
        UnsupportedError: the step cannot be looked at as far as the last of these modules.
    """
    units, counted = list(_modules(module)), CountCost()
    calls = Calls(module, (), units=units, replicate=replicate)
    try:
        before = analyse(module, calls, step, device=device, cost=counted).before
        often = Counter(call.unit for call in before)
        first = next(iter(before.values()), Cost())
        once = [
            call.unit
            for call, cost in before.items()
            if cost != first and often[call.unit] == 1 and _may_begin(call.unit, calls)
        ]
    finally:
        calls.remove()
    calls = Calls(module, once, units=units, replicate=replicate)
    try:
        passing = dict(zip(once, passing_bytes(module, calls, step, device=device), strict=True))
    finally:
        calls.remove()
    costs = {call.unit: cost for call, cost in before.items()}
    found: dict[Cost, Place] = {}
    for unit, num_bytes in passing.items():
        here = found.get(costs[unit])
        # Of modules that begin at the same moment, the outermost comes first.
        if isinstance(num_bytes, int) and (here is None or num_bytes < here.passing):
            found[costs[unit]] = Place(unit=unit, before=costs[unit], passing=num_bytes)
    refused = {unit: str(error) for unit, error in passing.items() if isinstance(error, CutError)}
    return Survey(places=tuple(found.values()), end=counted.so_far, refused=refused)


def _modules(module: nn.Module) -> Iterator[str]:
    """Yield the modules that may be called, but for what lies in repeated blocks; a sequence of larger modules is none."""
    blocks = tuple(f"{name}." for name, block in find_blocks(module).items() if not _is_sequence_of_modules(block))
    for name, child in module.named_modules():
        if name and not isinstance(child, _NEVER_CALLED) and not name.startswith(blocks):
            yield name


def _is_sequence_of_modules(block: nn.Module) -> bool:
    """Return whether a block is a level of a network, such as the residual blocks of one size, not a layer of it."""
    return isinstance(block, nn.Sequential) and any(
        next(child.children(), None) is not None and next(child.parameters(), None) is not None for child in block
    )


def _may_begin(unit: str, calls: Calls) -> bool:
    return next(calls.units[unit].parameters(), None) is not None and not calls.is_replicated(unit)
