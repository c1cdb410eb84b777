"""Where each rank stands among stages and data-parallel ranks, as scripts that were written for DeepSpeed ask it."""

from __future__ import annotations

import math
import os
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from meshbolt.errors import ConfigError, UnsupportedError

_ORDER = ("pipe", "data", "model")


def rank_and_world() -> tuple[int, int]:
    """Return the number of this rank and how many there are, as far as is known before ranks are connected."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class ProcessTopology:
    """Ranks in a grid with named axes, of which the last one is that of neighbours.

    Attributes:
        axes: their names.
        dims: how many ranks each has.

    Example:
        >>> ProcessTopology(["pipe", "data"], [2, 4]).get_rank(pipe=1, data=2)
        6
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or not axes or min(dims) < 1 or len(set(axes)) < len(axes):
            raise ConfigError(
                f"ProcessTopology(axes={list(axes)}, dims={list(dims)}): give each axis a name and a size."
            )
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord: Any = namedtuple("ProcessCoord", self.axes)  # type: ignore[misc]

    def check(self) -> None:
        """Refuse a grid that meshbolt does not have.

        Raises:
            ConfigError: there is no axis of stages.
            UnsupportedError: the axes are others, or in another order, or layers are divided by the script.
        """
        if "pipe" not in self.axes:
            raise ConfigError(
                f"A topology with the axes {self.axes} has no stages. Add an axis 'pipe', or give num_stages=."
            )
        if self.get_dim("model") > 1:
            raise UnsupportedError(
                f"The topology has {self.get_dim('model')} ranks on the axis 'model', whose layers a script divides. Leave "
                'the axis out, write ordinary layers, and put "tensor_parallel": {"autotp_size": ...} into the JSON.'
            )
        wide = [axis for axis, dim in zip(self.axes, self.dims, strict=True) if dim > 1]
        if wide != [axis for axis in _ORDER if axis in wide]:
            raise UnsupportedError(
                f"The topology has the axes {self.axes}. Ranks of a stage are neighbours here: use PipeDataParallelTopology."
            )

    def world_size(self) -> int:
        """Return the number of ranks."""
        return math.prod(self.dims)

    def get_axis_names(self) -> list[str]:
        """Return the names of the axes."""
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Return how many ranks an axis has; 0 where there is no such axis.

        Args:
            axis: its name.
        """
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_coord(self, rank: int) -> Any:
        """Return where a rank stands, as a named tuple.

        Args:
            rank: global.

        Raises:
            ConfigError: there is no such rank.
        """
        if not 0 <= rank < self.world_size():
            raise ConfigError(f"get_coord({rank}): the topology has {self.world_size()} ranks, numbered from 0.")
        found = []
        for dim in reversed(self.dims):
            rank, place = divmod(rank, dim)
            found.append(place)
        return self.ProcessCoord(*reversed(found))

    def get_rank(self, **coord: int) -> int:
        """Return the rank that stands somewhere.

        Args:
            coord: its place on every axis.

        Raises:
            ConfigError: an axis is missing, or the place is outside of it.
        """
        if coord.keys() != set(self.axes) or not all(
            0 <= coord[a] < d for a, d in zip(self.axes, self.dims, strict=True)
        ):
            raise ConfigError(
                f"get_rank({coord}): the axes are {dict(zip(self.axes, self.dims, strict=True))}. Give a place on each."
            )
        rank = 0
        for axis, dim in zip(self.axes, self.dims, strict=True):
            rank = rank * dim + coord[axis]
        return rank

    def filter_match(self, **coord: int) -> list[int]:
        """Return the ranks that stand at some places of some axes.

        Args:
            coord: the places.
        """
        ranks = range(self.world_size())
        return [r for r in ranks if all(getattr(self.get_coord(r), axis) == place for axis, place in coord.items())]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """Return the ranks at one place of an axis.

        Args:
            axis: its name.
            idx: the place.
        """
        return self.filter_match(**{axis: idx})


class PipeDataParallelTopology(ProcessTopology):
    """Stages, and ranks that have the same one."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Stages, ranks that have the same one, and ranks that share its layers."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])


class PipelineParallelGrid:
    """Answers where a rank stands.

    Attributes:
        global_rank: its number.
        stage_id: its stage.
        data_parallel_id: which part of the samples it sees.
        pipe_parallel_size: number of stages.
        data_parallel_size: number of ranks that see different samples.
    """

    def __init__(self, topology: ProcessTopology, *, rank: int | None = None) -> None:
        """Look the rank up.

        Args:
            topology: of all ranks.
            rank: global; None: this one.
        """
        rank = rank_and_world()[0] if rank is None else rank
        self._topo, self.global_rank, self.world_size = topology, rank, topology.world_size()
        place = topology.get_coord(rank)
        self.stage_id, self.data_parallel_id = place.pipe, getattr(place, "data", 0)
        self.pipe_parallel_size = topology.get_dim("pipe")
        self.data_parallel_size = max(topology.get_dim("data"), 1)
        self.model_parallel_size = max(topology.get_dim("model"), 1)
        self.is_first_stage, self.is_last_stage = self.stage_id == 0, self.stage_id == self.pipe_parallel_size - 1

    def topology(self) -> ProcessTopology:
        """Return the grid."""
        return self._topo

    def get_global_rank(self) -> int:
        """Return the number of the rank."""
        return self.global_rank

    def get_stage_id(self) -> int:
        """Return the rank's stage."""
        return int(self.stage_id)

    def get_pipe_parallel_rank(self) -> int:
        """Return the rank's stage."""
        return int(self.stage_id)

    def get_pipe_parallel_world_size(self) -> int:
        """Return the number of stages."""
        return self.pipe_parallel_size

    def get_data_parallel_id(self) -> int:
        """Return which part of the samples the rank sees."""
        return int(self.data_parallel_id)

    def get_data_parallel_rank(self) -> int:
        """Return which part of the samples the rank sees."""
        return int(self.data_parallel_id)

    def get_data_parallel_world_size(self) -> int:
        """Return how many ranks see different samples."""
        return self.data_parallel_size

    def stage_to_global(self, stage_id: int, **others: int) -> int:
        """Return the rank that has a stage for the same samples.

        Args:
            stage_id: the stage.
            others: places on other axes; those left out are this rank's.
        """
        return self._topo.get_rank(**{**self._topo.get_coord(self.global_rank)._asdict(), "pipe": stage_id, **others})
