"""Shards that lie in other memory than FSDP2 has given them, and are gathered from what a function returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import _to_dtype_if_needed
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from meshbolt.compat.units import groups_of


def shards_on_host(*, pin_memory: bool) -> OffloadPolicy:
    """Return the policy by which FSDP2 keeps shards and their gradients in host memory.

    Args:
        pin_memory: lock it in its place, for a GPU to read and write by itself.
    """
    return CPUOffloadPolicy(pin_memory=pin_memory)


def move_shards(
    unit: FSDPModule,
    moved: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]],
    *,
    fetch: Callable[[int], torch.Tensor],
) -> None:
    """Put a unit's shards into other memory, and gather them from elsewhere from then on; parameters stay the same objects.

    Args:
        unit: sharded with `shards_on_host`, not gathered.
        moved: takes the shards, each in one dim with all that FSDP2 keeps behind it, and returns others of the same values.
        fetch: takes a shard's number, and returns it on the device where units are gathered.
    """
    held = [fsdp_param for group in groups_of(unit) for fsdp_param in group.fsdp_params]
    flats = [fsdp_param._sharded_param_data for fsdp_param in held]
    for number, (fsdp_param, flat, new) in enumerate(zip(held, flats, moved(flats), strict=True)):
        parameter = fsdp_param.sharded_param
        local = parameter._local_tensor
        place = new.storage_offset() + local.storage_offset() - flat.storage_offset()
        parameter._local_tensor = new.as_strided(local.size(), local.stride(), place)
        fsdp_param._sharded_param_data = new
        fsdp_param.__class__ = _FetchedParam
        fsdp_param.fetch_shard = functools.partial(fetch, number)


class _FetchedParam(FSDPParam):
    """A parameter whose shard is fetched when it is gathered."""

    fetch_shard: Callable[[], torch.Tensor]

    @property
    def all_gather_inputs(self) -> list[torch.Tensor]:
        """What this rank adds to the gather, (padded elements,) on the device, in the dtype in which it is gathered."""
        found: Any = _to_dtype_if_needed(self.fetch_shard(), self.param_dtype)
        return [found]
