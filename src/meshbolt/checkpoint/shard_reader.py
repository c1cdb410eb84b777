"""DCP's plan of what this rank reads, carried out: each chunk read once, straight into where its values are wanted."""

from __future__ import annotations

import functools
import itertools
import mmap
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from meshbolt.checkpoint.chunks import bytes_of, check_chunk, naming_file, read_values
from meshbolt.checkpoint.manifest import Manifest
from meshbolt.checkpoint.staging import mapped, mapping_of
from meshbolt.checkpoint.storage import Files
from meshbolt.errors import CheckpointError


class ShardReader(StorageReader):
    """Reads the parts that one rank needs."""

    def __init__(
        self,
        files: Files,
        *,
        manifest: Manifest,
        metadata: Metadata,
        verify: bool,
        fresh: Collection[str],
        reading: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._files = files
        self._reading = reading
        self._metadata = metadata
        self._verify = verify
        self._fresh = frozenset(fresh)
        self._chunks = {
            (name, chunk.offset): chunk for name, record in manifest.files.items() for chunk in record.chunks
        }
        self._staged: list[tuple[torch.Tensor, Callable[[torch.Tensor], object]]] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader serves one load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata that was read and checked before."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the metadata is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read all that this rank needs, in the order of the files; what is not fresh is kept for `fill`."""
        items = sorted(plan.items, key=self._position)
        for name, of_file in itertools.groupby(items, key=lambda item: self._position(item)[0]):
            with self._reading(), naming_file(name), self._files.open(name, "rb") as stream:
                mapping = mapping_of(stream) if self._verify else None
                for _, of_chunk in itertools.groupby(of_file, key=self._position):
                    self._read_chunk(stream, list(of_chunk), planner=planner, mapping=mapping)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def fill(self) -> None:
        """Copy to the tensors what was read for them."""
        while self._staged:
            target, fill = self._staged.pop()
            fill(target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: what to read is not chosen by an id."""
        return False

    def _position(self, item: ReadItem) -> tuple[str, int]:
        info = self._metadata.storage_data[item.storage_index]
        return info.relative_path, info.offset

    def _read_chunk(
        self, stream: IO[bytes], items: list[ReadItem], *, planner: LoadPlanner, mapping: mmap.mmap | None
    ) -> None:
        position = self._position(items[0])
        chunk = self._chunks.get(position)
        if chunk is None:
            raise CheckpointError(f"the manifest knows of no part at byte {position[1]}: it is damaged")
        shape, dtype = self._saved(items[0].storage_index)
        targets = [planner.resolve_tensor(item).detach() for item in items]
        if self._is_direct(items, targets[0], shape=shape, dtype=dtype):
            read_values(stream, chunk=chunk, into=bytes_of(targets[0]), verify=self._verify)
        elif mapping is not None and not self._fresh.intersection(item.dest_index.fqn for item in items):
            check_chunk(stream, chunk=chunk, num_bytes=shape.numel() * dtype.itemsize)
            waiting = mapped(mapping, offset=chunk.offset + chunk.values, shape=shape, dtype=dtype)
            self._staged += [
                (target, functools.partial(waiting.fill, narrow=_part(item)))
                for item, target in zip(items, targets, strict=True)
            ]
        else:
            values = torch.empty(shape, dtype=dtype)
            read_values(stream, chunk=chunk, into=bytes_of(values), verify=self._verify)
            for item, target in zip(items, targets, strict=True):
                self._deliver(item, target, values)

    def _is_direct(self, items: list[ReadItem], target: torch.Tensor, *, shape: torch.Size, dtype: torch.dtype) -> bool:
        """Return whether a chunk can be read into the memory of a tensor: it is all that is wanted, as it is wanted."""
        return (
            len(items) == 1
            and items[0].dest_index.fqn in self._fresh
            and target.shape == shape
            and target.dtype == dtype
            and target.device.type == "cpu"
            and target.is_contiguous()
        )

    def _deliver(self, item: ReadItem, target: torch.Tensor, values: torch.Tensor) -> None:
        wanted = values[_part(item)]
        if item.dest_index.fqn in self._fresh:
            target.copy_(wanted)
            return
        # A part is copied, lest it keeps the memory of all of the chunk.
        kept = wanted if wanted.numel() == values.numel() else wanted.clone()
        self._staged.append((target, lambda tensor: tensor.copy_(kept)))

    def _saved(self, index: MetadataIndex) -> tuple[torch.Size, torch.dtype]:
        entry = self._metadata.state_dict_metadata[index.fqn]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{index.fqn!r} is no tensor there")
        return _chunk_at(entry, index).sizes, entry.properties.dtype


def _part(item: ReadItem) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))


def _chunk_at(entry: TensorStorageMetadata, index: MetadataIndex) -> ChunkStorageMetadata:
    hint = index.index
    if hint is not None and hint < len(entry.chunks) and entry.chunks[hint].offsets == index.offset:
        return entry.chunks[hint]
    return next(chunk for chunk in entry.chunks if chunk.offsets == index.offset)
