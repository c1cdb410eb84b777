"""Random numbers for sharded tensors on CPUs: those that the whole tensor would get in one process.

torch draws each shard from the rank's own generator. Generators that were seeded alike, as they are in every run, then give
the same numbers to every shard: layers that are initialised again after sharding have repeated rows, and nothing tells. So a
sharded tensor's numbers are drawn as the whole tensor's, of which every rank keeps its part; it takes the memory of one
whole tensor for a moment. GPUs need none of this: their generators can be moved to where a shard begins.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

from meshbolt import compat
from meshbolt.compat import local_tensor
from meshbolt.engine.gathered import local_part

_aten = torch.ops.aten
_IN_PLACE = (
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.bernoulli_.float,
    _aten.exponential_.default,
    _aten.log_normal_.default,
    _aten.cauchy_.default,
    _aten.geometric_.default,
    _aten.random_.default,
    _aten.random_.to,
    getattr(_aten.random_, "from"),
)
_LIKE = (
    _aten.rand_like.default,
    _aten.randn_like.default,
    _aten.randint_like.default,
    _aten.randint_like.low_dtype,
)


def draw_whole_tensors() -> None:
    """Draw for sharded tensors on CPUs as for whole ones, from now on; again is nothing."""
    for operation in _IN_PLACE:
        compat.handle_sharded(operation, _draw_in_place)
    for operation in _LIKE:
        compat.handle_sharded(operation, _draw_like)


def _draw_in_place(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DTensor:
    shard = cast("DTensor", args[0])
    whole = torch.empty(shard.shape, dtype=shard.dtype, device=local_tensor(shard).device)
    operation(whole, *args[1:], **kwargs)
    local_tensor(shard).copy_(local_part(whole, like=shard))
    return shard


def _draw_like(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DTensor:
    shard = cast("DTensor", args[0])
    like = torch.empty(shard.shape, dtype=shard.dtype, device=local_tensor(shard).device)
    part = local_part(operation(like, *args[1:], **kwargs), like=shard).clone()
    return compat.distributed_tensor(part, like=shard, placements=shard.placements)
