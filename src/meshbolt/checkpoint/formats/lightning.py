"""Lightning's own checkpoint: one file that `torch.load`, `load_from_checkpoint` and every strategy of Lightning's read.

The file is a zip archive: a pickle that refers to the memory of tensors by number, and a record for the memory of each.
torch writes it with records left empty, from tensors that have no memory; they are filled one by one, and their checksums
put where the archive keeps them, so that any program for zip files finds it whole.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from meshbolt.checkpoint.chunks import bytes_of
from meshbolt.checkpoint.foreign import refusal
from meshbolt.checkpoint.formats.options import ExportOptions, OnBytes, Readable, Source
from meshbolt.checkpoint.formats.safetensors import weights_only_objects
from meshbolt.checkpoint.lazy import LazyTensor
from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.checkpoint.optimizers import OWN, by_name, by_number, sharded_keys
from meshbolt.checkpoint.tree import join_tensors, markers, split_tensors
from meshbolt.compat import storages_without_memory, tensors_without_memory
from meshbolt.errors import CheckpointError

OPTIONS = frozenset({"weights_only"})

_DESCRIPTOR = b"PK\x07\x08"  # follows the content of a record, and has its checksum


class LightningWriter:
    """Writes one file with everything that a checkpoint holds but what is of single ranks: their random states, and buffers."""

    def __init__(self, reader: Readable, options: ExportOptions) -> None:
        """Read what is no tensor.

        Args:
            reader: the checkpoint; stays open until it is written.
            options: how objects are read.

        Raises:
            CheckpointError: it holds objects of classes that the options do not allow.
        """
        self._reader = reader
        objects = reader.objects(weights_only=options.weights_only)
        objects.pop(OWN, None)
        self._objects = by_number(objects)
        self._keys = list(dict.fromkeys(markers(self._objects)))
        self.num_tensors = len(self._keys)
        self.num_bytes = sum(reader.tensors[key].num_bytes for key in self._keys)
        self.notes: tuple[str, ...] = ()

    def write(self, out: Path, *, on_bytes: OnBytes) -> None:
        """Write the file."""
        with tensors_without_memory():
            empty = {key: torch.empty(info.shape, dtype=info.dtype) for key, info in self._infos().items()}
        tree = {key: join_tensors(value, empty) for key, value in self._objects.items()}
        with storages_without_memory():
            order = storages_in(tree)
            torch.save(tree, out)
        keys = {tensor.untyped_storage()._cdata: key for key, tensor in empty.items()}
        with out.open("r+b") as file:
            archive = Archive(file)
            for number, storage in enumerate(order):
                key = keys.get(storage._cdata)
                content = self._reader.read(key) if key is not None else torch.empty(0, dtype=torch.uint8).set_(storage)
                archive.fill(f"data/{number}", bytes_of(content))
                on_bytes(content.nbytes)
                del content
            file.flush()
            os.fsync(file.fileno())

    def _infos(self) -> Mapping[str, TensorInfo]:
        return {key: self._reader.tensors[key] for key in self._keys}


class _StorageCollector(pickle.Pickler):
    """Pickles into nothing, and collects the storages that it meets."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=2)
        self.found: dict[int, torch.UntypedStorage] = {}

    def persistent_id(self, obj: Any) -> str | None:
        """Take note of a storage, which `torch.save` would give the next number."""
        storage = obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj
        if not isinstance(storage, torch.UntypedStorage):
            return None
        self.found.setdefault(storage._cdata, storage)
        return "storage"


def storages_in(tree: Any) -> list[torch.UntypedStorage]:
    """Return the storages of all tensors in a tree, in the order in which `torch.save` numbers them."""
    collector = _StorageCollector()
    collector.dump(tree)
    return list(collector.found.values())


class Archive:
    """A file of `torch.save` whose records have room for content, and nothing in it."""

    def __init__(self, file: IO[bytes]) -> None:
        """Find its records.

        Args:
            file: open for reading and writing.
        """
        self._file = file
        with zipfile.ZipFile(file) as archive:
            self._records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            self._entries = dict(zip(self._records, _entry_offsets(file, archive.start_dir), strict=True))

    def fill(self, name: str, content: memoryview) -> None:
        """Write the content of a record, and its checksum in both places.

        Args:
            name: of the record, without the archive's.
            content: as long as the record says.
        """
        record, file = self._records[name], self._file
        if record.file_size != len(content):
            raise AssertionError(f"{name} has room for {record.file_size} bytes, and gets {len(content)}")
        if not content:
            return
        crc = struct.pack("<I", zlib.crc32(content))
        file.seek(record.header_offset + 26)
        start = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        file.seek(start)
        file.write(content)
        if file.read(4) != _DESCRIPTOR:
            raise AssertionError(f"torch has written no descriptor after {name}, where its checksum would be")
        file.write(crc)
        file.seek(self._entries[name] + 16)
        file.write(crc)


def _entry_offsets(file: IO[bytes], start: int) -> Iterator[int]:
    """Yield where each record's entry in the archive's directory begins."""
    at = start
    while True:
        file.seek(at)
        entry = file.read(46)
        if entry[:4] != b"PK\x01\x02":
            return
        yield at
        at += 46 + sum(struct.unpack("<HHH", entry[28:34]))


# Import ---------------------------------------------------------------------------------------------------------------


def recognises(path: Path) -> bool:
    """Return whether a path is a file as `torch.save` writes it."""
    return path.is_file() and zipfile.is_zipfile(path)


def read(path: Path, *, prefix: str, weights_only: bool | None) -> Source:
    """Return what a file of Lightning's holds, or a bare state dict as a checkpoint of weights only.

    Args:
        path: the file.
        prefix: what is put before each weight's name.
        weights_only: False builds objects of any class, which runs code from the file; else plain data only.

    Raises:
        CheckpointError: it cannot be read, or holds objects of classes that `weights_only` does not allow.
    """
    found = _loaded(path, weights_only=weights_only)
    notes: tuple[str, ...] = ()
    if not isinstance(found.get("state_dict"), Mapping):
        if not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise CheckpointError(
                f"{str(path)!r} is neither a checkpoint of Lightning's (it has no 'state_dict') nor a bare state dict (not all "
                f"of its values are tensors). Its entries: {', '.join(map(str, list(found)[:8]))}."
            )
        found = weights_only_objects(found)
        notes = ("The file is a bare state dict: the checkpoint holds weights only.",)
    found["state_dict"] = {f"{prefix}{name}": value for name, value in found["state_dict"].items()}
    found, more = by_name(found)
    tensors: dict[str, torch.Tensor] = {}
    objects = {key: split_tensors(value, key, tensors) for key, value in found.items()}
    mapped = {key: _on_use(tensor) for key, tensor in tensors.items()}
    objects[OWN] = {"sharded": sharded_keys(objects, mapped)}
    return Source(tensors=mapped, objects=objects, notes=(*notes, *more))


def _loaded(path: Path, *, weights_only: bool | None) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only is not False)
    except Exception as error:  # of a damaged file, errors of almost every class
        raise CheckpointError(f"{str(path)!r} {refusal(error, path)}.") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{str(path)!r} holds a {type(found).__name__}, and no checkpoint of Lightning's.")
    return dict(found)


def _on_use(tensor: torch.Tensor) -> torch.Tensor:
    info = TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)
    return LazyTensor(lambda: tensor, info=info, keeps_parts=False)
