"""Load a checkpoint: found and compared on every rank first, then read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint.agreement import Ranks, ReplacedError
from meshbolt.checkpoint.compare import LoadReport, compare, merge
from meshbolt.checkpoint.manifest import FILE_NAME, FileRecord
from meshbolt.checkpoint.metadata import FILE_NAME as METADATA
from meshbolt.checkpoint.metadata import read_metadata, tensors_in
from meshbolt.checkpoint.objects import FILE_NAME as OBJECTS
from meshbolt.checkpoint.objects import read_objects
from meshbolt.checkpoint.places import place_of
from meshbolt.checkpoint.shards import info_of, read_shards
from meshbolt.checkpoint.storage import Found, Place, check_sizes
from meshbolt.checkpoint.stored import StoredReader
from meshbolt.errors import CheckpointError

T = TypeVar("T")


def load_objects(
    path: str | os.PathLike[str],
    *,
    weights_only: bool | None = None,
    verify: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint holds beside its tensors, on every rank; a collective of all ranks.

    Args:
        path: the checkpoint's directory, or its URL.
        weights_only: False builds objects of any class, which runs code from the file; True or None plain data only.
        verify: compare the checksum of what is read; the sizes of all files are compared in any case.
        storage_options: what fsspec passes to the file system of a URL, such as credentials.
        group: the ranks that load, with a CPU backend; None for all, or for a single process.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it holds objects of classes that `weights_only` does
            not allow; the same on every rank.
    """
    ranks, place = Ranks(group), place_of(path, storage_options=storage_options)

    def read() -> dict[str, Any]:
        reading = _open(place, ranks=ranks, verify=verify)
        return ranks.agree(lambda: reading.objects(weights_only), failing=reading.failing)

    return _once_more_if_replaced(read)


def load_tensors(
    path: str | os.PathLike[str],
    into: Mapping[str, torch.Tensor],
    *,
    strict: bool = True,
    prefix: str | tuple[str, ...] = "",
    verify: bool = True,
    fresh: Collection[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> LoadReport:
    """Fill tensors from a checkpoint, in place, whatever layout it was saved in; a collective of all ranks.

    All is read and verified before a tensor is touched. From local files that takes no memory but the system's cache of
    files; from other storage, or without `verify`, as much memory on the CPU as this rank's part of what is loaded.

    Args:
        path: the checkpoint's directory, or its URL.
        into: by key, the tensors to fill, sharded in any way; ranks may ask for different keys. Values are cast to the
            tensor's dtype, within one kind of numbers, and the report says so.
        strict: raise where keys or shapes differ. False fills what fits and leaves the rest as it is.
        prefix: saved keys that begin with none of these may be absent from `into`.
        verify: compare the checksums of what is read; the sizes of all files are compared in any case.
        fresh: keys of tensors that were made for this load and are of no use should it fail. They are filled while the
            files are read, without memory in between.
        storage_options: what fsspec passes to the file system of a URL, such as credentials.
        group: the ranks that load, with a CPU backend; None for all, or for a single process.

    Returns:
        How the checkpoint and `into` differ, the same on every rank.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it differs from `into`; the same on every rank. No
            tensor has changed then, but those that are fresh.
    """
    ranks, place = Ranks(group), place_of(path, storage_options=storage_options)

    def read() -> LoadReport:
        reading = _open(place, ranks=ranks, verify=verify)
        metadata = ranks.agree(reading.metadata, failing=reading.failing)
        report = _compared(into, metadata=metadata, strict=strict, prefix=prefix, reading=reading)
        saved = tensors_in(metadata)
        fitting = {key: tensor for key, tensor in into.items() if key in saved and key not in report.mismatched}
        reading.fill(fitting, metadata=metadata, fresh=fresh)
        return report

    return _once_more_if_replaced(read)


def open_tensors(
    path: str | os.PathLike[str],
    wanted: Mapping[str, DTensor | None],
    *,
    verify: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, torch.Tensor]:
    """Return tensors of a checkpoint that stay there, and are read when they are used; a collective of all ranks.

    Their values are not in memory (`StoredTensor`; of a DTensor, this rank's part). Used once, each takes two ways through the
    checkpoint: here what they need is read to compare its checksums. Then nobody compares it again.

    Args:
        path: the checkpoint's directory, or its URL.
        wanted: by key, a tensor of the same shape in whose layout each is wanted; None: whole.
        verify: compare the checksums now.
        storage_options: what fsspec passes to the file system of a URL, such as credentials.
        group: the ranks that load, with a CPU backend; None for all, or for a single process.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or has no such tensors; the same on every rank.
    """
    ranks, place = Ranks(group), place_of(path, storage_options=storage_options)

    def read() -> dict[str, torch.Tensor]:
        reading = _open(place, ranks=ranks, verify=verify)
        metadata = ranks.agree(reading.metadata, failing=reading.failing)
        opened = ranks.agree(lambda: reading.stored(wanted, metadata=metadata), failing=reading.failing)
        ranks.each(reading.check_unchanged, failing=reading.failing)
        return opened

    return _once_more_if_replaced(read)


def _once_more_if_replaced(read: Callable[[], T]) -> T:
    try:
        return read()
    except ReplacedError:
        return read()


def _compared(
    into: Mapping[str, torch.Tensor],
    *,
    metadata: Metadata,
    strict: bool,
    prefix: str | tuple[str, ...],
    reading: _Reading,
) -> LoadReport:
    def look() -> LoadReport:
        asked = {key: info_of(key, tensor) for key, tensor in into.items()}
        return compare(saved=tensors_in(metadata), asked=asked, prefix=prefix)

    report = merge(reading.ranks.each(look, failing=reading.failing))
    if strict and (faults := report.faults()):
        raise CheckpointError(f"{reading.failing}: it does not fit what it is loaded into.{faults}")
    return report


def _open(place: Place, *, ranks: Ranks, verify: bool) -> _Reading:
    failing = f"Checkpoint {place.text!r} cannot be loaded"

    def look() -> _Reading:
        reading = _Reading(place=place, found=place.find(), ranks=ranks, failing=failing, verify=verify)
        with reading.as_long_as_it_is_there():
            # Each file is looked at by one rank.
            check_sizes(reading.found, names=sorted(reading.found.manifest.files)[ranks.rank :: ranks.size])
        return reading

    reading = ranks.agree(look, failing=failing)
    if len(set(ranks.gather(reading.found.manifest.save_id, failing=failing))) > 1:
        raise ReplacedError(
            f"{failing}: different ranks find different checkpoints there. It was replaced at this moment, in which "
            "case load again, or the machines do not share the file system."
        )
    return reading


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A checkpoint that all ranks have found."""

    place: Place
    found: Found
    ranks: Ranks
    failing: str
    verify: bool

    def objects(self, weights_only: bool | None) -> dict[str, Any]:
        """Return what is beside the tensors."""
        with self.as_long_as_it_is_there():
            objects = read_objects(self.found.files, weights_only=weights_only, record=self._record(OBJECTS))
        self.check_unchanged()
        return objects

    def metadata(self) -> Metadata:
        """Return what DCP knows of the tensors, every file of which the manifest has vouched for."""
        with self.as_long_as_it_is_there():
            metadata = read_metadata(self.found.files, record=self._record(METADATA))
        strange = {place.relative_path for place in metadata.storage_data.values()} - set(self.found.manifest.files)
        if strange:
            raise CheckpointError(f"its tensors lie in files that its {FILE_NAME} does not name: {sorted(strange)}")
        return metadata

    def stored(self, wanted: Mapping[str, DTensor | None], *, metadata: Metadata) -> dict[str, torch.Tensor]:
        """Return tensors that stay where they are, and are not damaged there."""
        with self.as_long_as_it_is_there():
            found = self.found
            reader = StoredReader(found.files, manifest=found.manifest, metadata=metadata, verify=self.verify)
            return reader.open(wanted)

    def fill(self, into: Mapping[str, torch.Tensor], *, metadata: Metadata, fresh: Collection[str]) -> None:
        """Fill tensors that fit; a collective of all ranks."""
        read_shards(
            self.found.files,
            metadata=metadata,
            into=into,
            ranks=self.ranks,
            failing=self.failing,
            manifest=self.found.manifest,
            verify=self.verify,
            fresh=fresh,
            reading=self.as_long_as_it_is_there,
            check=self.check_unchanged,
        )

    @contextlib.contextmanager
    def as_long_as_it_is_there(self) -> Iterator[None]:
        """Have an error say that the checkpoint was replaced, if that is what is wrong."""
        try:
            yield
        except Exception as error:
            self.check_unchanged(error)
            raise

    def check_unchanged(self, failure: Exception | None = None) -> None:
        """Check that nobody has replaced or removed the checkpoint since it was found."""
        try:
            unchanged = self.place.find().manifest.save_id == self.found.manifest.save_id
        except (CheckpointError, OSError):
            unchanged = False
        if not unchanged:
            raise ReplacedError("it was replaced or removed while it was read; load again") from failure

    def _record(self, name: str) -> FileRecord | None:
        if not self.verify:
            return None
        if name not in self.found.manifest.files:
            raise CheckpointError(f"its {FILE_NAME} does not name {name}: it is damaged")
        return self.found.manifest.files[name]
