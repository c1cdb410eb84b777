"""Apply torch's `fully_shard` (or, for stage 0, `replicate`) to the units and the root of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from meshbolt.compat import replicate
from meshbolt.mesh import MeshAxis
from meshbolt.zero.policy import StagePolicy


class Root(nn.Module):
    """The outermost unit: it owns what no other unit does, and calls any function with those parameters gathered.

    It stands outside of the user's module, so that the module's class, the names of its parameters and calls to itself
    stay as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        """Call the function, which is to use the module."""
        return function()


def shard_unit(
    unit: nn.Module,
    *,
    mesh: DeviceMesh,
    stage: StagePolicy,
    precision: MixedPrecisionPolicy,
    whole: frozenset[nn.Parameter],
    is_root: bool = False,
    shard_dim: Callable[[nn.Parameter], Shard | None] | None = None,
) -> FSDPModule:
    """Shard (or replicate) what the unit owns, in place, and return it.

    Args:
        unit: a module whose inner units are sharded already.
        mesh: the whole mesh.
        stage: the ZeRO stage.
        precision: dtypes for gathering, reduction and the unit's output.
        whole: parameters to leave alone.
        shard_dim: says along which dim a parameter is sharded; None for the first.
        is_root: the root keeps its parameters gathered between forward and backward, which follow each other at once.
    """
    if not stage.shards:
        return replicate(unit, mesh=mesh[MeshAxis.DP_REPLICATE.value], mp_policy=precision, ignored_params=set(whole))
    replicas = mesh[MeshAxis.DP_REPLICATE.value].size()
    axes = (MeshAxis.DP_REPLICATE.value, MeshAxis.DP_SHARD.value) if replicas > 1 else MeshAxis.DP_SHARD.value
    return fully_shard(
        unit,
        mesh=mesh[axes],
        reshard_after_forward=stage.reshards_after_forward and not is_root,
        mp_policy=precision,
        ignored_params=set(whole),
        shard_placement_fn=shard_dim,
    )
