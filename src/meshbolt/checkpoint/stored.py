"""Tensors that stay in a checkpoint until they are used, and are then read in runs: this rank's part of each, of any layout.

Who opens them compares the checksums of all that they may read; what is read later is read again, and not compared again.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint.chunks import bytes_of, check_chunk, naming_file, own_pages, read_bytes
from meshbolt.checkpoint.manifest import Chunk, Manifest
from meshbolt.checkpoint.storage import Files
from meshbolt.compat import (
    RUN_BYTES,
    Box,
    StoredTensor,
    box_span,
    box_view,
    boxes_of,
    cut_box,
    distributed_tensor,
    local_tensor,
    own_pieces,
)
from meshbolt.errors import CheckpointError


class StoredReader:
    """Opens tensors of one checkpoint. Its files stay open as long as one of the tensors is there."""

    def __init__(self, files: Files, *, manifest: Manifest, metadata: Metadata, verify: bool) -> None:
        """Prepare.

        Args:
            files: of the checkpoint.
            manifest: the checkpoint's.
            metadata: what DCP knows of it.
            verify: compare the checksums of what tensors are opened for.
        """
        self._files, self._metadata, self._verify = _OpenFiles(files), metadata, verify
        self._chunks = {
            (name, chunk.offset): chunk for name, record in manifest.files.items() for chunk in record.chunks
        }
        # How many bytes of values each chunk has to hold, of those that are not compared yet.
        self._to_check: dict[tuple[str, int], int] = {}

    def open(self, wanted: Mapping[str, DTensor | None]) -> dict[str, torch.Tensor]:
        """Return tensors by key, and read all of what they may read once, to compare its checksums.

        Args:
            wanted: keys of the checkpoint's tensors, with a tensor of the same shape whose layout each is to have; None: whole.

        Raises:
            CheckpointError: something of it is not there, or damaged.
        """
        found = {key: self._open(key, like) for key, like in wanted.items()}
        for (name, offset), num_bytes in sorted(self._to_check.items()):
            with naming_file(name):
                check_chunk(self._files.of(name), chunk=self._chunks[name, offset], num_bytes=num_bytes)
        self._to_check.clear()
        return found

    def _open(self, key: str, like: DTensor | None) -> torch.Tensor:
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"it has no tensor {key!r}")
        dtype = entry.properties.dtype
        whole = tuple(slice(0, size) for size in entry.size)
        pieces = [(whole, whole)] if like is None else own_pieces(like)
        shape = tuple(entry.size) if like is None else tuple(local_tensor(like).shape)
        sources = [source for here, there in pieces for source in self._sources(key, entry, here, there)]
        if sum(_size(source.box) for source in sources) != math.prod(shape):
            raise CheckpointError(f"its metadata does not know all of {key!r}: it is damaged")
        part = StoredTensor(_SavedPart(self._files, shape, dtype, sources), shape=shape, dtype=dtype)
        return part if like is None else distributed_tensor(part, like=like, placements=like.placements)

    def _sources(
        self, key: str, entry: TensorStorageMetadata, here: tuple[slice, ...], there: tuple[slice, ...]
    ) -> Iterator[_Source]:
        """Yield what was saved of one run of the whole that this rank has."""
        sizes = torch.Size(run.stop - run.start for run in there)
        if not sizes.numel():
            return
        wanted = ChunkStorageMetadata(offsets=torch.Size(run.start for run in there), sizes=sizes)
        for item in create_read_items_for_chunk_list(key, entry, [wanted]):
            saved = next(chunk for chunk in entry.chunks if chunk.offsets == item.storage_index.offset)
            place = self._metadata.storage_data[item.storage_index]
            chunk = self._chunk(place.relative_path, place.offset)
            self._note(place.relative_path, chunk, saved.sizes.numel() * entry.properties.dtype.itemsize)
            yield _Source(
                file=place.relative_path,
                offset=chunk.offset + chunk.values,
                shape=tuple(saved.sizes),
                box=tuple((a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True)),
                at=tuple(run.start + a for run, a in zip(here, item.dest_offsets, strict=True)),
            )

    def _chunk(self, name: str, offset: int) -> Chunk:
        chunk = self._chunks.get((name, offset))
        if chunk is None:
            raise CheckpointError(f"the manifest knows of no part at byte {offset} of {name}: it is damaged")
        return chunk

    def _note(self, name: str, chunk: Chunk, num_bytes: int) -> None:
        if chunk.values + num_bytes > chunk.length:
            raise CheckpointError(f"file {name}: it holds fewer values than its metadata says: it is damaged")
        if self._verify:
            self._to_check[name, chunk.offset] = num_bytes


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What one rank has saved of a part.

    Attributes:
        file: its name.
        offset: where in it the values of all that this rank has saved begin.
        shape: of all that.
        box: of it that is wanted.
        at: where that begins in the part.
    """

    file: str
    offset: int
    shape: tuple[int, ...]
    box: Box
    at: tuple[int, ...]

    def overlap(self, block: Box) -> Box | None:
        """Return what of this a box of the part has, as a box of what was saved; None: nothing."""
        found = []
        for (first, last), (start, stop), at in zip(block, self.box, self.at, strict=True):
            begin, end = max(first, at), min(last, at + stop - start)
            if begin >= end:
                return None
            found.append((begin - at + start, end - at + start))
        return tuple(found)

    def place(self, box: Box, *, within: Box) -> tuple[slice, ...]:
        """Return where a box of what was saved lies in a box of the part.

        Args:
            box: of what was saved.
            within: of the part.
        """
        return tuple(
            slice(first - start + at - origin, last - start + at - origin)
            for (first, last), (start, _), at, (origin, _) in zip(box, self.box, self.at, within, strict=True)
        )


class _SavedPart:
    """The values of this rank's part of a tensor."""

    def __init__(
        self, files: _OpenFiles, shape: tuple[int, ...], dtype: torch.dtype, sources: Sequence[_Source]
    ) -> None:
        self._files, self._shape, self._dtype, self._sources = files, shape, dtype, sources

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Read blocks from where they were saved."""
        limit = min(stop - start, max(1, RUN_BYTES // self._dtype.itemsize))
        memory = own_pages(limit * self._dtype.itemsize).view(self._dtype)
        for box in boxes_of(self._shape, start, stop):
            for block in cut_box(box, self._shape, limit):
                values = memory[: _size(block)]
                self._fill(values.view([last - first for first, last in block]), block, limit)
                yield values

    def _fill(self, values: torch.Tensor, block: Box, limit: int) -> None:
        for source in self._sources:
            wanted = source.overlap(block)
            for box in cut_box(wanted, source.shape, limit) if wanted is not None else ():
                first, last = box_span(box, source.shape)
                offset = source.offset + first * self._dtype.itemsize
                if _size(box) == last - first == values.numel():  # all of the block, as it lies
                    self._files.read(source.file, offset, bytes_of(values))
                else:
                    run = torch.empty(last - first, dtype=self._dtype)
                    self._files.read(source.file, offset, bytes_of(run))
                    values[source.place(box, within=block)] = box_view(run, box, source.shape)


class _OpenFiles:
    """Files of a checkpoint that stay open: another checkpoint may take its place while they are read."""

    def __init__(self, files: Files) -> None:
        self._files, self._opened = files, contextlib.ExitStack()
        self._streams: dict[str, IO[bytes]] = {}
        weakref.finalize(self, self._opened.close)

    def of(self, name: str) -> IO[bytes]:
        """Return one of them."""
        if name not in self._streams:
            self._streams[name] = self._opened.enter_context(self._files.open(name, "rb"))
        return self._streams[name]

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill memory from a file.

        Raises:
            CheckpointError: it ends early, or cannot be read any more.
        """
        with naming_file(name):
            read_bytes(self.of(name), offset=offset, into=into)


def _size(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
