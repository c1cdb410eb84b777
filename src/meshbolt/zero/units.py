"""Which modules share one all-gather (a unit), and which parameters stay whole on every rank.

A unit is what is gathered, used and freed together. Whatever no unit holds belongs to the root, which is gathered for the
whole step. Three kinds of parameters stay whole on every rank, outside of all units, and only their gradients travel:
0-dim ones, which cannot be sharded; ones that are not floating-point; and the odd ones out of a unit with several dtypes.
Under mixed precision so do the parameters of normalisation layers (see `KeepNorms`).
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from meshbolt.blocks import find_blocks, modules_by_name_or_class
from meshbolt.zero.policy import Zero

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """How a module's parameters are divided.

    Attributes:
        units: modules that become units, by name, innermost first.
        whole: parameters that stay whole on every rank.
        blocks: the repeated blocks that were found or named, in the order of the model.
    """

    units: Mapping[str, nn.Module]
    whole: frozenset[nn.Parameter]
    blocks: Mapping[str, nn.Module]


class KeepNorms(enum.Enum):
    """Which normalisation layers keep their few parameters whole and as stored, where others are gathered in 16 bits."""

    NONE = enum.auto()
    RUNNING_STATISTICS = enum.auto()
    """Those whose buffers stay in full precision: torch wants parameters and statistics in one dtype."""
    ALL = enum.auto()
    """All of them: autocast runs them in float32, and on CPUs torch refuses float32 inputs with 16-bit parameters."""


def plan_units(
    module: nn.Module,
    setting: Zero,
    *,
    keep_norms: KeepNorms = KeepNorms.NONE,
    also_whole: frozenset[nn.Parameter] = frozenset(),
) -> UnitPlan:
    """Divide a module into units.

    Args:
        module: the user's whole module, not sharded yet.
        setting: the user's `zero`.
        keep_norms: which normalisation layers stay whole.
        also_whole: further parameters that stay whole.

    Raises:
        ConfigError: the user's `unit` names what the module does not have.
    """
    names = setting.unit_names
    blocks = find_blocks(module) if names is None else modules_by_name_or_class(module, names, setting="Zero.unit")
    tied = _shared_between(module, blocks)
    units = {name: block for name, block in blocks.items() if not any(p in tied for p in block.parameters())}
    whole = also_whole | _whole_parameters(module, units.values(), keep_norms=keep_norms)
    innermost_first = dict(sorted(units.items(), key=lambda item: -item[0].count(".")))
    kept = {name: unit for name, unit in innermost_first.items() if any(p not in whole for p in unit.parameters())}
    return UnitPlan(units=kept, whole=whole, blocks=blocks)


def _shared_between(module: nn.Module, blocks: Mapping[str, nn.Module]) -> set[nn.Parameter]:
    """Return parameters used in more than one unit; a gathered parameter has one owner, so their units merge into the root."""
    # By identity and under every name: a block that is used in two places is one unit, not two.
    ids = {id(block) for block in blocks.values()}
    places = {name: id(child) for name, child in module.named_modules(remove_duplicate=False) if id(child) in ids}
    owners: defaultdict[nn.Parameter, set[int | None]] = defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners[parameter].add(_innermost(name, places))
    return {parameter for parameter, units in owners.items() if len(units) > 1}


def _innermost(parameter_name: str, places: Mapping[str, int]) -> int | None:
    parts = parameter_name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        if (prefix := ".".join(parts[:depth])) in places:
            return places[prefix]
    return None


def _whole_parameters(
    module: nn.Module, units: Iterable[nn.Module], *, keep_norms: KeepNorms
) -> frozenset[nn.Parameter]:
    whole = {p for p in module.parameters() if p.dim() == 0 or not p.is_floating_point()}
    for child in module.modules():
        if _stays_whole(child, keep_norms):
            whole.update(child.parameters(recurse=False))
    taken: set[nn.Parameter] = set()
    for unit in [*sorted(units, key=lambda u: sum(1 for _ in u.modules())), module]:
        own = [p for p in unit.parameters() if p not in taken and p not in whole]
        taken.update(own)
        whole.update(_odd_dtypes(own))
    return frozenset(whole)


def _stays_whole(child: nn.Module, keep: KeepNorms) -> bool:
    if keep is KeepNorms.ALL:
        return isinstance(child, _NORMS)
    return keep is KeepNorms.RUNNING_STATISTICS and isinstance(child, _NormBase) and child.track_running_stats


def _odd_dtypes(parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """Return the parameters that are not of the dtype most numbers of the unit have: a unit moves one dtype."""
    numel: Counter[torch.dtype] = Counter()
    own = list(parameters)
    for parameter in own:
        numel[parameter.dtype] += parameter.numel()
    return {p for p in own if p.dtype != numel.most_common(1)[0][0]}
