"""A checkpoint that is opened once and read tensor by tensor, by one process alone and whatever its process groups.

`load.py` fills the shards of a run, all ranks together; this is for whoever wants whole tensors, one after the other, and
no more of them in memory than the one at hand. It reads any directory of torch's distributed checkpoint (DCP). Each part
of a tensor lies in its file as `torch.save` wrote it, a zip archive of its own, whose checksum is compared.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from typing_extensions import Self

from meshbolt.checkpoint.agreement import in_words
from meshbolt.checkpoint.directory import find, local_path
from meshbolt.checkpoint.lazy import LazyTensor
from meshbolt.checkpoint.manifest import FILE_NAME, Manifest, read_manifest
from meshbolt.checkpoint.metadata import TensorInfo, read_metadata, tensors_in
from meshbolt.checkpoint.objects import read_objects
from meshbolt.checkpoint.tree import join_tensors
from meshbolt.errors import CheckpointError

_PIECE_BYTES = 16 * 2**20


class ShardReader:
    """Whole tensors out of the files of a DCP directory, whoever wrote it.

    The directory stays the one that was opened, also where another takes its name meanwhile. Use it as a context, or
    call `close`.

    Attributes:
        directory: where the files are.
        tensors: shape and dtype of every tensor, by key.
        metadata: what DCP knows of them.
    """

    def __init__(self, directory: Path, *, name: str | None = None) -> None:
        """Open a directory.

        Args:
            directory: has DCP's `.metadata`.
            name: how it is called in messages; None for its path.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.directory = directory
        self.name = str(directory) if name is None else name
        self._closing = ExitStack()
        try:
            self.metadata: Metadata = read_metadata(directory)
            self._folder = os.open(directory, os.O_RDONLY)
        except (CheckpointError, OSError) as error:
            raise self._failure(error) from error
        self._closing.callback(os.close, self._folder)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors_in(self.metadata))

    def close(self) -> None:
        """Close the directory; lazy tensors of it cannot be read any more."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def read(self, key: str) -> torch.Tensor:
        """Return a whole tensor, in memory of its own.

        Args:
            key: one of `tensors`.

        Raises:
            CheckpointError: there is no such tensor, or what is there of it is damaged.
        """
        if key not in self.tensors:
            raise self._failure(CheckpointError(f"it has no tensor {key!r}"))
        info = self.tensors[key]
        whole = torch.empty(info.shape, dtype=info.dtype)
        chunks = cast("TensorStorageMetadata", self.metadata.state_dict_metadata[key]).chunks
        covered = sum(math.prod(chunk.sizes) for chunk in chunks)
        try:
            if covered != whole.numel():
                raise CheckpointError(f"it has {covered} elements of the {whole.numel()} of {key!r}: it is damaged")
            for chunk in chunks:
                part = whole
                for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                    part = part.narrow(dim, start, size)
                if part.numel():
                    self._read_chunk(MetadataIndex(key, chunk.offsets), into=part)
        except (CheckpointError, OSError) as error:
            raise self._failure(error) from error
        return whole

    def lazy(self, key: str, *, keeps_parts: bool = True) -> LazyTensor:
        """Return a tensor that is read when it is used, as long as this reader is open.

        Args:
            key: one of `tensors`.
            keeps_parts: as for `LazyTensor`.
        """
        return LazyTensor(lambda: self.read(key), info=self.tensors[key], keeps_parts=keeps_parts)

    def other_objects(self, *, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what DCP has saved among the tensors and is no tensor, by key.

        Args:
            weights_only: False builds objects of any class, which runs code from the files; else plain data only.

        Raises:
            CheckpointError: something of it is of a class that `weights_only` does not allow, or damaged.
        """
        entries = self.metadata.state_dict_metadata.items()
        keys = [key for key, entry in entries if isinstance(entry, BytesStorageMetadata)]
        return {key: self._read_object(key, weights_only=weights_only is not False) for key in keys}

    def _read_object(self, key: str, *, weights_only: bool) -> Any:
        try:
            with self._open(MetadataIndex(key)) as view:
                return torch.load(io.BytesIO(view.read()), map_location="cpu", weights_only=weights_only)
        except Exception as error:  # of a damaged file, errors of almost every class
            raise self._failure(CheckpointError(f"its object {key!r} cannot be read ({in_words(error)})")) from error

    def _read_chunk(self, index: MetadataIndex, *, into: torch.Tensor) -> None:
        with self._open(index) as view:
            try:
                record = next(info for info in zipfile.ZipFile(view).infolist() if info.filename.endswith("/data/0"))
                with torch.serialization.skip_data():
                    view.seek(0)
                    written: torch.Tensor = torch.load(cast("IO[bytes]", view), map_location="cpu", weights_only=True)
            except Exception as error:  # of a damaged file, errors of almost every class
                raise CheckpointError(f"its tensor {index.fqn!r} is damaged ({in_words(error)})") from error
            if (written.shape, written.dtype) != (into.shape, into.dtype) or record.file_size != written.nbytes:
                raise CheckpointError(f"its tensor {index.fqn!r} is not what its metadata says: it is damaged")
            view.seek(_data_offset(view, record))
            direct = into.is_contiguous() and written.is_contiguous()
            target = into if direct else written
            crc = _fill(target, view)
            if crc != record.CRC:
                raise CheckpointError(f"its tensor {index.fqn!r} has changed since it was saved: it is damaged")
            if not direct:
                into.copy_(written)

    def _open(self, index: MetadataIndex) -> FileSlice:
        place = self.metadata.storage_data[index]
        if Path(place.relative_path).name != place.relative_path:
            raise CheckpointError(f"its metadata names the file {place.relative_path!r} outside of it: do not trust it")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{index.fqn!r} was written with {place.transform_descriptors}; save it without")
        try:
            descriptor = os.open(place.relative_path, os.O_RDONLY, dir_fd=self._folder)
        except FileNotFoundError:
            raise CheckpointError(f"its file {place.relative_path} is missing") from None
        return FileSlice(os.fdopen(descriptor, "rb", buffering=0), start=place.offset, num_bytes=place.length)

    def _failure(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"Checkpoint {self.name!r} cannot be read: {in_words(error)}.")


class CheckpointReader(ShardReader):
    """A checkpoint of meshbolt's, opened once.

    Attributes:
        manifest: what its manifest says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a checkpoint, and compare the sizes of its files with its manifest.

        Args:
            path: the checkpoint's directory.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
            UnsupportedError: the path is a URL.
        """
        target = local_path(path)
        try:
            directory = find(target)
            self.manifest: Manifest = read_manifest(directory / FILE_NAME)
            self.manifest.check_files(directory, names=self.manifest.files)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"Checkpoint {str(target)!r} cannot be read: {in_words(error)}.") from error
        super().__init__(directory, name=str(target))

    def objects(self, *, weights_only: bool | None = None) -> dict[str, Any]:
        """Return everything that is no tensor, with markers where tensors belong.

        Args:
            weights_only: False builds objects of any class, which runs code from the file; else plain data only.

        Raises:
            CheckpointError: it holds objects of classes that `weights_only` does not allow, or is damaged.
        """
        try:
            return read_objects(self.directory, weights_only=weights_only)
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


class FileSlice(io.RawIOBase):
    """A part of a file, as a file of its own that is only read."""

    def __init__(self, file: io.FileIO, *, start: int, num_bytes: int) -> None:
        """Take a file, which is closed with this one.

        Args:
            file: open for reading.
            start: where the part begins.
            num_bytes: its length.
        """
        super().__init__()
        self._file, self._start, self._num_bytes = file, start, num_bytes
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a place in the part."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as the part goes, and return how much that was."""
        wanted = memoryview(buffer).cast("B")[: max(self._num_bytes - self._at, 0)]
        done = 0
        while done < len(wanted):
            self._file.seek(self._start + self._at)
            if not (num_read := self._file.readinto(wanted[done:])):
                break
            self._at += num_read
            done += num_read
        return done

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor on the CPU, of any dtype, in the order in which it lies there.

    Args:
        tensor: with elements beside each other, in whatever order of its dimensions.
    """
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size()
    return flat[start : start + tensor.nbytes].numpy().data


def _data_offset(view: FileSlice, record: zipfile.ZipInfo) -> int:
    """Return where the content of a record begins, which only the header before it tells."""
    view.seek(record.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", view.read(4))
    return int(record.header_offset + 30 + name_bytes + extra_bytes)


def _fill(tensor: torch.Tensor, source: FileSlice) -> int:
    """Read a tensor's memory from a file, and return the checksum of what was read."""
    memory, crc = bytes_of(tensor), 0
    for start in range(0, len(memory), _PIECE_BYTES):
        piece = memory[start : start + _PIECE_BYTES]
        if source.readinto(piece) < len(piece):
            raise CheckpointError("a file of it is shorter than its metadata says: it is damaged")
        crc = zlib.crc32(piece, crc)
    return crc
