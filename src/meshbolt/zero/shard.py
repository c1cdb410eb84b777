"""Apply torch's `fully_shard` (or, for stage 0, `replicate`) to the units and the root of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
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


class _Placement:
    """Says along which dim a parameter is sharded, and frees what is no longer needed: torch holds all until the last is done."""

    def __init__(
        self,
        unit: nn.Module,
        shard_dim: Callable[[nn.Parameter], Shard | None] | None,
        may_free: Callable[[nn.Parameter], bool],
    ) -> None:
        self._unit, self._shard_dim, self._may_free = unit, shard_dim, may_free
        self._before: nn.Parameter | None = None

    def __call__(self, parameter: nn.Parameter) -> Shard | None:
        # torch may ask for all of them before it shards the first.
        if self._before is not None and all(self._before is not each for each in self._unit.parameters()):
            self._before.data = self._before.data.new_empty(0)
        self._before = parameter if self._may_free(parameter) else None
        return None if self._shard_dim is None else self._shard_dim(parameter)


def shard_unit(
    unit: nn.Module,
    *,
    mesh: DeviceMesh,
    stage: StagePolicy,
    precision: MixedPrecisionPolicy,
    whole: frozenset[nn.Parameter],
    is_root: bool = False,
    shard_dim: Callable[[nn.Parameter], Shard | None] | None = None,
    may_free: Callable[[nn.Parameter], bool] = lambda _: False,
    offload: OffloadPolicy | None = None,
) -> FSDPModule:
    """Shard (or replicate) what the unit owns, in place, and return it.

    Args:
        unit: a module whose inner units are sharded already.
        mesh: the whole mesh.
        stage: the ZeRO stage.
        precision: dtypes for gathering, reduction and the unit's output.
        whole: parameters to leave alone.
        shard_dim: says along which dim a parameter is sharded; None for the first.
        may_free: whether nobody else needs the values of a parameter, once it is sharded.
        offload: where shards lie; None: on the device.
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
        offload_policy=OffloadPolicy() if offload is None else offload,
        shard_placement_fn=_Placement(unit, shard_dim, may_free),
    )
