"""Where stages begin, from what the user's setting says of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from meshbolt.blocks import find_blocks
from meshbolt.errors import ConfigError, did_you_mean
from meshbolt.pipeline.analyse import analyse
from meshbolt.pipeline.balance import choose_cuts
from meshbolt.pipeline.calls import Calls
from meshbolt.pipeline.schedule import order_of
from meshbolt.pipeline.setting import AUTO, PipelineParallel

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def cuts_of(
    module: nn.Module, setting: PipelineParallel, step: Callable[[], Any], *, device: torch.device
) -> tuple[str, ...]:
    """Return the modules with which stages 1, 2, ... begin.

    Cuts that are given are taken as they are, and whether a step can be cut there is found out by looking at it. Otherwise the
    step is looked at to see in which order it calls what may be cut, and how much work lies before each.

    Args:
        module: the user's, whole or on meta.
        setting: the user's.
        step: runs a microbatch of the module, from its inputs to the loss.
        device: where it computes.

    Raises:
        ConfigError: a name is unknown, or there are fewer places for a cut than stages need.
        UnsupportedError: the step cannot be cut at all.
    """
    if setting.stages == 1:
        return ()
    if isinstance(setting.cuts, tuple):
        Calls(module, setting.cuts, replicate=setting.replicate).remove()  # which refuses names that cannot be
        return setting.cuts
    live = live_microbatches(setting)
    if setting.blocks == AUTO and setting.split == AUTO:
        return choose_cuts(module, step, setting.stages, device=device, live=live, replicate=setting.replicate)
    blocks = _blocks(module, setting)
    asked = f"{type(module).__name__} has {len(blocks)} blocks" + (
        "" if setting.blocks == AUTO else f" in {', '.join(setting.blocks)}"
    )
    if len(blocks) < setting.stages:
        raise ConfigError(
            f"{asked}, of which {setting.stages} stages cannot have one each. Use fewer stages, or name cuts, which may be any "
            "modules."
        )
    if isinstance(setting.split, tuple) and sum(setting.split) != len(blocks):
        raise ConfigError(
            f"{asked}, and split={list(setting.split)} distributes {sum(setting.split)}. Give {setting.stages} numbers whose sum "
            f"is {len(blocks)}."
        )
    if isinstance(setting.split, tuple):
        blocks = _in_order(module, blocks, setting, step, device=device)
        return tuple(blocks[place] for place in itertools.accumulate(setting.split[:-1]))
    return choose_cuts(
        module, step, setting.stages, device=device, among=blocks, live=live, replicate=setting.replicate
    )


def live_microbatches(setting: PipelineParallel) -> list[int]:
    """Return of how many microbatches each stage holds activations at once, at most.

    Args:
        setting: with "auto", as many microbatches are taken as a large batch is divided into.

    Example:
        >>> live_microbatches(PipelineParallel(4)), live_microbatches(PipelineParallel(2, schedule="gpipe"))
        ([4, 3, 2, 1], [4, 4])
    """
    count = setting.microbatches_of(2 * setting.size) if setting.microbatches == AUTO else int(setting.microbatches)
    held, most = [0] * setting.stages, [0] * setting.stages
    for rank in order_of(setting.order, setting.stages, setting.size, count):
        for work, stage, _ in rank:
            held[stage] += {"F": 1, "B": -1, "I": -1, "W": 0}[work]
            most[stage] = max(most[stage], held[stage])
    return most


def _blocks(module: nn.Module, setting: PipelineParallel) -> list[str]:
    """Return the names of the blocks that the setting means, list by list."""
    if setting.blocks == AUTO:
        found = list(find_blocks(module))
        if found:
            return found
        raise ConfigError(
            f"PipelineParallel(split={list(setting.split)}): {type(module).__name__} has no repeated blocks that could be found. "
            "Name the lists of modules in `blocks`, or name cuts."
        )
    names = dict(module.named_modules())
    return [f"{path}.{key}" for path in setting.blocks for key, _ in _list_at(module, names, path).named_children()]


def _list_at(module: nn.Module, names: Mapping[str, nn.Module], path: str) -> nn.Module:
    holding = {name.rpartition(".")[0] for name in find_blocks(module)} - {""}
    lists = sorted(holding) or [name for name, child in names.items() if name and isinstance(child, _LISTS)]
    if path not in names:
        raise ConfigError(
            f"PipelineParallel(blocks=...): {type(module).__name__} has no module {path!r}{did_you_mean(path, lists)}."
        )
    found = names[path]
    if not isinstance(found, _LISTS) or not len(found):
        raise ConfigError(
            f"PipelineParallel(blocks=...): {path!r} is a {type(found).__name__}, and not a list of modules that could be cut. "
            f"Name one of {', '.join(lists) or 'those of another model, as this one has none'}, or name cuts."
        )
    return found


def _in_order(
    module: nn.Module,
    blocks: Sequence[str],
    setting: PipelineParallel,
    step: Callable[[], Any],
    *,
    device: torch.device,
) -> list[str]:
    """Return blocks in the order in which a step calls them."""
    calls = Calls(module, (), units=blocks, replicate=setting.replicate)
    try:
        plan = analyse(module, calls, step, device=device)
    finally:
        calls.remove()
    called = [call.unit for call in plan.stubs if call.number == 0]
    missing = next((block for block in blocks if block not in called), None)
    if missing is not None:
        why = f" It could be looked at as far as {plan.ended_by}" if plan.ended_by else ""
        raise ConfigError(
            f"PipelineParallel(split={list(setting.split)}) counts the block {missing!r}, which a step does not call. Name lists "
            f"whose modules are all called in `blocks`, or name cuts.{why}"
        )
    wanted = frozenset(blocks)
    return [name for name in called if name in wanted]
