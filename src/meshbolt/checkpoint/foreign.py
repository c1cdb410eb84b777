"""A directory of torch's distributed checkpoint that anybody has written, read tensor by tensor.

It has no manifest and no checksums. Its metadata is read as that of our own checkpoints: nothing in it is run.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

from meshbolt.checkpoint.agreement import in_words
from meshbolt.checkpoint.metadata import read_metadata
from meshbolt.checkpoint.reader import TensorReader
from meshbolt.compat import part_of_file
from meshbolt.errors import CheckpointError


class RefusedClassesError(CheckpointError):
    """A file holds objects of classes that were not allowed; nothing is known to be wrong with it.

    Attributes:
        classes: their full names.
    """

    classes: tuple[str, ...] = ()


class DcpReader(TensorReader):
    """Whole tensors, and objects, out of the files of a directory."""

    def __init__(self, directory: Path) -> None:
        """Open a directory.

        Args:
            directory: has DCP's `.metadata`.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.name = str(directory)
        self._directory = directory
        try:
            metadata = read_metadata(directory)
        except (CheckpointError, OSError) as error:
            raise self._failure(error) from error
        super().__init__(metadata, name=self.name)

    def objects(self, *, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what was saved among the tensors and is no tensor, by key.

        Args:
            weights_only: False builds objects of any class, which runs code from the files; else plain data only.

        Raises:
            CheckpointError: something of it is of a class that `weights_only` does not allow, or damaged.
        """
        entries = self.metadata.state_dict_metadata.items()
        keys = [key for key, entry in entries if isinstance(entry, BytesStorageMetadata)]
        try:
            return {key: self._load(MetadataIndex(key), weights_only=weights_only is not False) for key in keys}
        except (CheckpointError, OSError) as error:
            raise self._failure(error) from error

    def _read_whole(self, key: str) -> torch.Tensor:
        chunks = cast("TensorStorageMetadata", self.metadata.state_dict_metadata[key]).chunks
        if len(chunks) != 1 or tuple(chunks[0].sizes) != self.tensors[key].shape:
            return super()._read_whole(key)
        return self._load_part(MetadataIndex(key, chunks[0].offsets), shape=chunks[0].sizes).contiguous()

    def _read_part(self, index: MetadataIndex, *, into: torch.Tensor) -> None:
        into.copy_(self._load_part(index, shape=into.shape))

    def _load_part(self, index: MetadataIndex, *, shape: torch.Size) -> torch.Tensor:
        values = self._load(index, weights_only=True)
        if not isinstance(values, torch.Tensor) or (values.shape, values.dtype) != (
            shape,
            self.tensors[index.fqn].dtype,
        ):
            raise CheckpointError(f"{index.fqn!r} is not what its metadata says: it is damaged")
        return values

    def _load(self, index: MetadataIndex, *, weights_only: bool) -> Any:
        with self._open(index) as part:
            try:
                return torch.load(part, map_location="cpu", weights_only=weights_only)
            except Exception as error:  # of a damaged file, errors of almost every class
                part.seek(0)
                raise CheckpointError(f"{index.fqn!r} {refusal(error, io.BytesIO(part.read()))}") from error

    @contextmanager
    def _open(self, index: MetadataIndex) -> Iterator[IO[bytes]]:
        place = self.metadata.storage_data[index]
        if os.fspath(Path(place.relative_path).name) != place.relative_path:
            raise CheckpointError(f"its metadata names the file {place.relative_path!r} outside of it: do not trust it")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{index.fqn!r} was written with {place.transform_descriptors}; save it without")
        with (self._directory / place.relative_path).open("rb") as file:
            yield part_of_file(file, place.offset, place.length)


def refusal(error: Exception, file: Path | IO[bytes], *, known: Collection[str] = ()) -> str:
    """Return in words why `torch.load` has not read a file.

    Args:
        error: what it raised.
        file: what it was to read.
        known: full names of classes that it may hold.
    """
    if not (classes := refused_classes(error, file, known=known)):
        return f"cannot be read ({_without_advice(error)})"
    return (
        f"holds objects of the classes {', '.join(classes)}, and to build them is to run their code. If you trust it, use "
        "weights_only=False (of a command: --weights-only false), or allow the classes by "
        "torch.serialization.add_safe_globals"
    )


def refused_classes(error: Exception, file: Path | IO[bytes], *, known: Collection[str] = ()) -> tuple[str, ...]:
    """Return the full names of the classes for which `torch.load` has not read a file; none where it was something else.

    Args:
        error: what it raised.
        file: what it was to read.
        known: full names of classes that it may hold.
    """
    classes: set[str] = set()
    if isinstance(error, pickle.UnpicklingError):
        with contextlib.suppress(
            Exception
        ):  # it is damaged, or of torch's old kind, of which the error names the first class
            classes = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        named = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error))
        classes = (classes or {named[1]} if named else classes) - set(known)
    return tuple(sorted(classes))


def _without_advice(error: Exception) -> str:
    """Return an error in words, without torch's advice to run a damaged file's code."""
    text = str(error)
    if "weights_only" not in text:
        return in_words(error)
    said = re.search(r"WeightsUnpickler error: (.*)", text)
    return f"{type(error).__name__}: {said[1].strip() if said else 'torch does not know it as a file of plain data'}"
