"""Axes of the mesh and the arithmetic of their sizes; nothing here needs a process group."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from meshbolt.errors import TopologyError


class MeshAxis(str, enum.Enum):
    """A named axis of the mesh, outermost first."""

    PP = "pp"
    DP_REPLICATE = "dp_replicate"
    DP_SHARD = "dp_shard"
    TP = "tp"


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many ranks stand along each axis.

    Attributes:
        dp_replicate: copies of the sharded state; each copy trains on its own samples.
        dp_shard: ranks among which one copy is sharded.
        tp: ranks that share each layer, and see the same samples.
        pp: ranks among which the stages of a pipeline are distributed, which see the same samples too.
    """

    dp_replicate: int
    dp_shard: int
    tp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        """The number of ranks: the product of all axes."""
        return self.pp * self.dp_replicate * self.dp_shard * self.tp

    @property
    def copies(self) -> int:
        """The number of ranks that see the same samples."""
        return self.pp * self.tp

    @property
    def data_parallel_size(self) -> int:
        """The number of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the axes by their names, outermost first; those of data parallelism, and others that are used."""
        sizes = {axis.value: getattr(self, axis.value) for axis in MeshAxis}
        return {name: size for name, size in sizes.items() if size > 1 or name.startswith("dp_")}

    def data_parallel_rank(self, rank: int) -> int:
        """Return which part of the samples this rank sees.

        Args:
            rank: global rank, `0 <= rank < world_size`.
        """
        return rank // self.tp % self.data_parallel_size

    def pipeline_rank(self, rank: int) -> int:
        """Return which of the ranks of a pipeline this one is.

        Args:
            rank: global rank, `0 <= rank < world_size`.
        """
        return rank // (self.tp * self.data_parallel_size)


def shape_for(
    *, world_size: int, shards: bool, replicate: int, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> MeshShape:
    """Divide the world among the axes.

    Args:
        world_size: number of ranks.
        shards: whether the state is sharded at all (every ZeRO stage but 0).
        replicate: copies of the sharded state (HSDP); 1 for none.
        tensor_parallel: ranks that share each layer.
        pipeline_parallel: ranks among which stages are distributed.

    Raises:
        TopologyError: the axes do not divide the world.
    """
    if world_size % tensor_parallel:
        raise TopologyError(
            f"tensor_parallel={tensor_parallel} asks for {tensor_parallel} ranks to share each layer, but {_ranks(world_size)} "
            f"cannot be divided by {tensor_parallel}. Use one of tensor_parallel={_divisors(world_size)}, or start another "
            f"number of ranks (a multiple of {tensor_parallel})."
        )
    groups = world_size // tensor_parallel
    of_layers = f" of {tensor_parallel} that share layers" if tensor_parallel > 1 else ""
    if groups % pipeline_parallel:
        raise TopologyError(
            f"pipeline_parallel={pipeline_parallel} asks for {pipeline_parallel} ranks in each pipeline, but {groups} "
            f"{f'groups{of_layers}' if of_layers else 'ranks'} cannot be divided by {pipeline_parallel}. Use one of "
            f"pipeline_parallel={_divisors(groups)}, or start another number of ranks (a multiple of "
            f"{pipeline_parallel * tensor_parallel})."
        )
    copies = {"tp": tensor_parallel, "pp": pipeline_parallel}
    data_parallel = groups // pipeline_parallel
    if not shards:
        return MeshShape(dp_replicate=data_parallel, dp_shard=1, **copies)
    if data_parallel % replicate:
        each = of_layers or (f" of {pipeline_parallel} in a pipeline" if pipeline_parallel > 1 else "")
        raise TopologyError(
            f"zero=Zero(replicate={replicate}) asks for {replicate} copies of the sharded state, but {data_parallel} "
            f"{f'groups{each}' if each else 'ranks'} cannot be divided by {replicate}. Use one of "
            f"replicate={_divisors(data_parallel)}, or start another number of ranks (a multiple of "
            f"{replicate * tensor_parallel * pipeline_parallel})."
        )
    return MeshShape(dp_replicate=replicate, dp_shard=data_parallel // replicate, **copies)


def _ranks(number: int) -> str:
    return f"{number} ranks" if number != 1 else "1 rank"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
