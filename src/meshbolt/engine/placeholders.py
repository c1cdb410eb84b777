"""What a checkpoint holds where ranks have different parameters: of a pipeline, each rank has those of its stages.

Every rank describes the whole, with placeholders for what it does not have: tensors on the meta device, which have a shape
and a dtype and no values.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist

from meshbolt.checkpoint.tree import rebuilt
from meshbolt.compat import tree_map_only
from meshbolt.pipeline.taint import is_foreign


def held_elsewhere(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no values in this process, since another stage of the pipeline holds it."""
    return is_foreign(tensor) or tensor.is_meta


def placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without values of the same whole shape and dtype.

    Args:
        tensor: of any kind; of a DTensor the shape of the whole counts.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def model_state(
    state: Mapping[str, Any], *, elsewhere: Container[str], group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Return a module's state dict with placeholders for what other stages hold; all ranks of the group call it together.

    Args:
        state: the module's state dict, with the same names on every rank.
        elsewhere: names of buffers and of other entries that another stage keeps up to date, so that what this one has of
            them does not count. Parameters without values are known by themselves.
        group: the ranks that hold the stages. What an entry is that is no tensor, only its stage knows; without a group
            this rank's is taken.
    """
    entries = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
    if entries and group is not None:
        own = {name: value for name, value in entries.items() if name not in elsewhere}
        entries = {**entries, **_of_all_ranks(own, group=group), **own}
    items = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            items[name] = placeholder(value) if name in elsewhere or held_elsewhere(value) else value
        else:
            items[name] = entries[name]
    return cast("dict[str, Any]", rebuilt(state, items))


def states_of_all_stages(state: Mapping[str, Any], *, group: dist.ProcessGroup) -> dict[str, Any]:
    """Return an optimizer's state with that of all stages, in one order on every rank; a collective of the group.

    Tensors that other stages hold are placeholders of their whole shapes; numbers and other plain values are as they have
    them.

    Args:
        state: of this rank's parameters, as `optimizer_state` returned it.
        group: the ranks that hold the stages.
    """
    grouped = [name for each in state["param_groups"] for name in each["params"]]
    return {**state, "state": entries_of_all_stages(state["state"], order=grouped, group=group)}


def entries_of_all_stages(own: Mapping[str, Any], *, order: Iterable[str], group: dist.ProcessGroup) -> dict[str, Any]:
    """Return this rank's entries and those of other stages, in one order on every rank; a collective of the group.

    Tensors that other stages hold are placeholders of their whole shapes.

    Args:
        own: this rank's, by the name of a parameter.
        order: names of parameters in the order of the result, the same on every rank; others follow.
        group: the ranks that hold the stages.
    """
    known = {**_of_all_ranks(own, group=group), **own}
    return {name: known[name] for name in dict.fromkeys((*order, *sorted(known))) if name in known}


def _of_all_ranks(own: Mapping[str, Any], *, group: dist.ProcessGroup) -> dict[str, Any]:
    """Return the entries of all ranks by name, with placeholders for tensors; where several have one, the first one's."""
    described = {name: tree_map_only(torch.Tensor, placeholder, value) for name, value in own.items()}
    each: list[dict[str, Any]] = [{}] * group.size()
    dist.all_gather_object(each, described, group=group)
    return {name: value for entries in reversed(each) for name, value in entries.items()}
