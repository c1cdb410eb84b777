"""DCP's metadata file, read without running code from it: which tensors there are, and where each part of them lies.

torch writes it as a pickle and reads it with `pickle.load`, which runs whatever a crafted file says. Here only the
classes that such a file is made of can be built.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata

from meshbolt.checkpoint.local import files_at
from meshbolt.checkpoint.manifest import FileRecord
from meshbolt.checkpoint.places import place_of
from meshbolt.checkpoint.storage import Files, read_file
from meshbolt.errors import CheckpointError

FILE_NAME = ".metadata"

_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},  # turns the name of a layout into the layout
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
_PATHS_IN = ("pathlib", "pathlib._local")  # the latter in Python 3.13


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        shape: of the whole tensor, whatever part of it a rank holds.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of all its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that builds nothing but checkpoint metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that metadata is made of, or a dtype."""
        if module in _PATHS_IN and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where it was written, which torch notes and nothing reads; no system has both classes
        if (module, name) == ("builtins", "getattr"):
            return _member_of_encoding  # some releases of Python 3.11 pickle an enum member as getattr(class, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        dtype = getattr(torch, name, None) if module == "torch" and "." not in name else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise CheckpointError(
            f"its {FILE_NAME} asks for {module}.{name}, which no checkpoint needs: do not trust this file"
        )


def _member_of_encoding(owner: Any, name: str) -> Any:
    """Stand in for `getattr` on the one enum that metadata holds."""
    if owner is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise CheckpointError(f"its {FILE_NAME} asks for an attribute that no checkpoint needs: do not trust this file")
    return _MEM_FORMAT_ENCODING[name]


def read_metadata(files: Path | Files, *, record: FileRecord | None = None) -> Metadata:
    """Read the metadata of a checkpoint.

    Args:
        files: the checkpoint's directory, or its files.
        record: what the manifest says of the file, to compare it with; None reads it as it is.

    Raises:
        CheckpointError: it is damaged, or holds what does not belong there.
    """
    content = read_file(files_at(files), FILE_NAME)
    if record is not None:
        record.check(content, name=FILE_NAME)
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises errors of almost every class
        raise CheckpointError(f"its {FILE_NAME} is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"its {FILE_NAME} is damaged: it holds a {type(metadata).__name__}")
    return metadata


def tensors_in(metadata: Metadata) -> dict[str, TensorInfo]:
    """Return the tensors that metadata tells of, by key."""
    return {
        key: TensorInfo(shape=tuple(entry.size), dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def saved_tensors(
    path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> dict[str, TensorInfo]:
    """Return shape and dtype of every tensor in a checkpoint, by key, without reading one; it asks no other rank.

    Args:
        path: a local path or a URL.
        storage_options: what fsspec passes to the file system of a URL.

    Raises:
        CheckpointError: there is no checkpoint, or its metadata is damaged.
    """
    place = place_of(path, storage_options=storage_options)
    try:
        found = place.find()
        return tensors_in(read_metadata(found.files, record=found.manifest.files.get(FILE_NAME)))
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"Checkpoint {place.text!r} cannot be read: {error}.") from error
