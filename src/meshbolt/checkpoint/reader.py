"""A checkpoint that is opened once and read tensor by tensor, by one process alone and whatever its process groups.

`load.py` fills the shards of a run, all ranks together; this is for whoever wants whole tensors, one after the other, and
no more of them in memory than the one at hand.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from typing_extensions import Self

from meshbolt.checkpoint.agreement import in_words
from meshbolt.checkpoint.chunks import bytes_of, naming_file, read_values
from meshbolt.checkpoint.lazy import LazyTensor
from meshbolt.checkpoint.metadata import FILE_NAME as METADATA
from meshbolt.checkpoint.metadata import TensorInfo, read_metadata, tensors_in
from meshbolt.checkpoint.objects import FILE_NAME as OBJECTS
from meshbolt.checkpoint.objects import read_objects
from meshbolt.checkpoint.places import place_of
from meshbolt.checkpoint.storage import check_sizes
from meshbolt.checkpoint.tree import join_tensors
from meshbolt.errors import CheckpointError


class TensorReader(ABC):
    """Whole tensors out of the parts that ranks have written. Use it as a context, or call `close`.

    Attributes:
        name: what messages call the checkpoint.
        metadata: what torch's distributed checkpoint (DCP) knows of it.
        tensors: shape and dtype of every tensor, by key.
    """

    def __init__(self, metadata: Metadata, *, name: str) -> None:
        """Take what is known.

        Args:
            metadata: of the checkpoint, checked.
            name: its path.
        """
        self.name = name
        self.metadata = metadata
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors_in(metadata))
        self._closing = ExitStack()
        self._is_open = True
        self._closing.callback(setattr, self, "_is_open", False)

    def close(self) -> None:
        """Read no more: lazy tensors that nobody has used have no values any more."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def read(self, key: str) -> torch.Tensor:
        """Return a whole tensor, contiguous and in memory of its own.

        Args:
            key: one of `tensors`.

        Raises:
            CheckpointError: there is no such tensor, or what is there of it is damaged.
        """
        try:
            if not self._is_open:
                raise CheckpointError(f"it was closed before {key!r} was read")
            if key not in self.tensors:
                raise CheckpointError(f"it has no tensor {key!r}")
            return self._read_whole(key)
        except (CheckpointError, OSError) as error:
            raise self._failure(error) from error

    def lazy(self, key: str, *, keeps_parts: bool = True) -> LazyTensor:
        """Return a tensor that is read when it is used, as long as this reader is open.

        Args:
            key: one of `tensors`.
            keeps_parts: as for `LazyTensor`.
        """
        return LazyTensor(lambda: self.read(key), info=self.tensors[key], keeps_parts=keeps_parts)

    def _read_whole(self, key: str) -> torch.Tensor:
        info = self.tensors[key]
        chunks = cast("TensorStorageMetadata", self.metadata.state_dict_metadata[key]).chunks
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(info.shape):
            raise CheckpointError(f"its metadata does not know all of {key!r}: it is damaged")
        whole = torch.empty(info.shape, dtype=info.dtype)
        for chunk in chunks:
            part = whole
            for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                part = part.narrow(dim, start, size)
            self._read_part(MetadataIndex(key, chunk.offsets), into=part)
        return whole

    @abstractmethod
    def _read_part(self, index: MetadataIndex, *, into: torch.Tensor) -> None:
        """Fill a part of a tensor with what one rank has written."""

    def _failure(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"Checkpoint {self.name!r} cannot be read: {in_words(error)}.")


class CheckpointReader(TensorReader):
    """A checkpoint of meshbolt's. All that is read of it is compared with its checksums.

    Attributes:
        manifest: what its manifest says.
    """

    def __init__(self, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        """Open a checkpoint, and compare the sizes of its files with its manifest.

        Args:
            path: its directory, or its URL.
            storage_options: what fsspec passes to the file system of a URL, such as credentials.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        self._place = place_of(path, storage_options=storage_options)
        self.name = self._place.text
        try:
            self._found = self._place.find()
            self.manifest = self._found.manifest
            check_sizes(self._found, names=sorted(self.manifest.files))
            metadata = read_metadata(self._found.files, record=self.manifest.files.get(METADATA))
        except (CheckpointError, OSError) as error:
            raise self._failure(error) from error
        super().__init__(metadata, name=self.name)
        self._chunks = {
            (name, chunk.offset): chunk for name, record in self.manifest.files.items() for chunk in record.chunks
        }

    def objects(self, *, weights_only: bool | None = None) -> dict[str, Any]:
        """Return everything that is no tensor, with markers where tensors belong.

        Args:
            weights_only: False builds objects of any class, which runs code from the file; else plain data only.

        Raises:
            CheckpointError: it holds objects of classes that `weights_only` does not allow, or is damaged.
        """
        record = self.manifest.files.get(OBJECTS)
        try:
            return read_objects(self._found.files, weights_only=weights_only, record=record)
        except (CheckpointError, OSError) as error:
            raise self._failure(error) from error

    def tree(self, *, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what was saved, with tensors that are read when they are used, as long as this reader is open.

        Args:
            weights_only: as for `objects`.
        """
        objects = self.objects(weights_only=weights_only)
        tensors = {key: self.lazy(key) for key in self.tensors}
        return {key: join_tensors(value, tensors) for key, value in objects.items()}

    def _read_part(self, index: MetadataIndex, *, into: torch.Tensor) -> None:
        info = self.metadata.storage_data[index]
        chunk = self._chunks.get((info.relative_path, info.offset))
        if chunk is None:
            raise CheckpointError(f"its manifest knows of no part at byte {info.offset} of {info.relative_path}")
        values = into if into.is_contiguous() else torch.empty(into.shape, dtype=into.dtype)
        with naming_file(info.relative_path), self._found.files.open(info.relative_path, "rb") as stream:
            read_values(stream, chunk=chunk, into=bytes_of(values), verify=True)
        if values is not into:
            into.copy_(values)

    def _failure(self, error: Exception) -> CheckpointError:
        return super()._failure(CheckpointError(_REPLACED) if self._was_replaced() else error)

    def _was_replaced(self) -> bool:
        """Return whether another checkpoint has taken the place of the one that was opened."""
        opened = getattr(self, "manifest", None)
        try:
            return opened is not None and self._place.find().manifest.save_id != opened.save_id
        except (CheckpointError, OSError):
            return False


_REPLACED = "it was replaced while it was read; start again"
