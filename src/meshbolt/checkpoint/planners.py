"""What torch's distributed checkpoint (DCP) is told of our tensors: which parts this rank has, and where in the whole.

DCP's own planners take the part of a rank for one run of the whole. Where a layer is divided section by section (queries,
keys and values in one projection) it is several, and each is a chunk of the tensor's key. All else is as DCP does it: a
chunk that several ranks have is written by one of them, and chunks of any layout are read into parts of any other.
"""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from meshbolt.compat import StoredTensor, local_tensor, own_pieces
from meshbolt.errors import CheckpointError


class PartsToSave(DefaultSavePlanner):
    """Plans one chunk for each run of the whole that this rank has."""

    def create_local_plan(self) -> SavePlan:
        """Return what this rank could write."""
        items = [item for key, tensor in self.state_dict.items() for item in _items_to_write(key, tensor)]
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return the values of a chunk."""
        return _chunk_of(self.state_dict[index.fqn], index)


class PartsToLoad(DefaultLoadPlanner):
    """Plans to fill each run of the whole that this rank has."""

    def create_local_plan(self) -> LoadPlan:
        """Return what this rank needs."""
        known = {} if self.metadata is None else self.metadata.state_dict_metadata
        items = []
        for key, tensor in self.state_dict.items():
            saved = known.get(key)
            if not isinstance(saved, TensorStorageMetadata) or saved.size != tensor.shape:
                raise CheckpointError(f"it has no tensor {key!r} of shape {tuple(tensor.shape)}")
            chunks = [
                ChunkStorageMetadata(offsets=offsets, sizes=values.shape) for offsets, values in _chunks_of(tensor)
            ]
            items += create_read_items_for_chunk_list(key, saved, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the memory of a chunk."""
        return _chunk_of(self.state_dict[index.fqn], index)


def _items_to_write(key: str, tensor: torch.Tensor) -> list[WriteItem]:
    return [
        WriteItem(
            index=MetadataIndex(key, offsets),
            type=WriteItemType.SHARD if isinstance(tensor, DTensor) else WriteItemType.TENSOR,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=values.shape),
                properties=TensorProperties.create_from_tensor(values),
                size=tensor.shape,
            ),
        )
        for offsets, values in _chunks_of(tensor)
    ]


def _chunks_of(tensor: torch.Tensor) -> list[tuple[torch.Size, torch.Tensor]]:
    """Return the runs of the whole that this rank has: where each begins, and its values, which are a view."""
    if not isinstance(tensor, DTensor) or not tensor.numel():  # somebody has to write what has no values
        return [(torch.Size([0] * tensor.dim()), local_tensor(tensor))]
    part = local_tensor(tensor)
    return [(torch.Size(run.start for run in there), _part_of(part, here)) for here, there in own_pieces(tensor)]


def _part_of(tensor: torch.Tensor, place: tuple[slice, ...]) -> torch.Tensor:
    return tensor.part(place) if isinstance(tensor, StoredTensor) else tensor[place]


def _chunk_of(tensor: torch.Tensor, index: MetadataIndex) -> torch.Tensor:
    for offsets, values in _chunks_of(tensor):
        if offsets == index.offset:
            return values
    raise AssertionError(f"{index} was not planned")
