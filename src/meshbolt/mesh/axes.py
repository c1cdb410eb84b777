"""Axes of the mesh and the arithmetic of their sizes; nothing here needs a process group."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from meshbolt.errors import TopologyError


class MeshAxis(str, enum.Enum):
    """A named axis of the mesh, outermost first."""

    DP_REPLICATE = "dp_replicate"
    DP_SHARD = "dp_shard"


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many ranks stand along each axis.

    Attributes:
        dp_replicate: copies of the sharded state; each copy trains on its own samples.
        dp_shard: ranks among which one copy is sharded.
    """

    dp_replicate: int
    dp_shard: int

    @property
    def world_size(self) -> int:
        """The number of ranks: the product of all axes."""
        return self.dp_replicate * self.dp_shard

    @property
    def data_parallel_size(self) -> int:
        """The number of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    def sizes(self) -> tuple[int, ...]:
        """Return the size of every axis, in the order of `MeshAxis`."""
        return tuple(getattr(self, axis.value) for axis in MeshAxis)

    def data_parallel_rank(self, rank: int) -> int:
        """Return which part of the samples this rank sees.

        Args:
            rank: global rank, `0 <= rank < world_size`.
        """
        return rank % self.data_parallel_size


def shape_for(*, world_size: int, shards: bool, replicate: int) -> MeshShape:
    """Divide the world among the axes.

    Args:
        world_size: number of ranks.
        shards: whether the state is sharded at all (every ZeRO stage but 0).
        replicate: copies of the sharded state (HSDP); 1 for none.

    Raises:
        TopologyError: `replicate` does not divide the world.
    """
    if not shards:
        return MeshShape(dp_replicate=world_size, dp_shard=1)
    if world_size % replicate:
        raise TopologyError(
            f"zero=Zero(replicate={replicate}) asks for {replicate} copies of the sharded state, but {world_size} ranks "
            f"cannot be divided by {replicate}. Use one of replicate={_divisors(world_size)}, or start another number of "
            f"ranks (a multiple of {replicate})."
        )
    return MeshShape(dp_replicate=replicate, dp_shard=world_size // replicate)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
