"""Look at a whole checkpoint, byte by byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import IO, Any

from meshbolt.checkpoint.checksum import Checksum
from meshbolt.checkpoint.manifest import FILE_NAME, Chunk, FileRecord
from meshbolt.checkpoint.metadata import FILE_NAME as METADATA
from meshbolt.checkpoint.metadata import read_metadata
from meshbolt.checkpoint.objects import FILE_NAME as OBJECTS
from meshbolt.checkpoint.places import place_of
from meshbolt.checkpoint.storage import Found
from meshbolt.errors import CheckpointError


def verify_checkpoint(
    path: str | os.PathLike[str],
    *,
    on_bytes: Callable[[int], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Read all of a checkpoint, compare every byte with its checksum, and return what is wrong, in words.

    It runs in one process and asks no other rank; nothing of the checkpoint is built or run.

    Args:
        path: the checkpoint's directory, or its URL.
        on_bytes: called with the number of bytes that have been read since the last call.
        storage_options: what fsspec passes to the file system of a URL, such as credentials.

    Returns:
        A sentence for each fault, which names the file; empty for a whole checkpoint.
    """
    place = place_of(path, storage_options=storage_options)
    count = on_bytes or (lambda num_bytes: None)
    try:
        found = place.find()
        faults = _faults_in(found, on_bytes=count)
        again = place.find()
        # Replaced meanwhile: what was found is not there any more.
        return _faults_in(again, on_bytes=count) if again.manifest.save_id != found.manifest.save_id else faults
    except (CheckpointError, OSError) as error:
        return (str(error),)


def _faults_in(found: Found, *, on_bytes: Callable[[int], None]) -> tuple[str, ...]:
    files = found.manifest.files
    faults = [f"{FILE_NAME} does not name {name}" for name in (METADATA, OBJECTS) if name not in files]
    for name, record in files.items():
        faults += _faults_of(found, name=name, record=record, on_bytes=on_bytes)
    return tuple(faults or _faults_between(found))


def _faults_of(found: Found, *, name: str, record: FileRecord, on_bytes: Callable[[int], None]) -> list[str]:
    faults = [] if _is_covered(record) else [f"{FILE_NAME} has no checksums for parts of {name}"]
    try:
        size = found.files.size(name)
        if size != record.num_bytes:
            faults.append(f"{name} has {size} bytes instead of {record.num_bytes}")
        with found.files.open(name, "rb") as stream:
            damaged = [chunk for chunk in record.chunks if _sum_of(stream, chunk, on_bytes=on_bytes) != chunk.checksum]
    except FileNotFoundError:
        return [*faults, f"{name} is missing"]
    except OSError as error:
        return [*faults, f"{name} cannot be read ({error})"]
    return faults + [f"{name} is damaged in its bytes {one.offset} to {one.offset + one.length - 1}" for one in damaged]


def _is_covered(record: FileRecord) -> bool:
    """Return whether every byte of a file lies in a chunk."""
    end = 0
    for chunk in record.chunks:
        if chunk.offset != end:
            return False
        end += chunk.length
    return end == record.num_bytes


def _sum_of(stream: IO[bytes], chunk: Chunk, *, on_bytes: Callable[[int], None]) -> str:
    checksum = Checksum()
    stream.seek(chunk.offset)
    for block in checksum.blocks(chunk.length):
        content = stream.read(block.stop - block.start)
        checksum.update(content)
        on_bytes(len(content))
    return checksum.hexdigest()


def _faults_between(found: Found) -> list[str]:
    """Return how whole files contradict each other: what DCP's metadata leads to has to be there."""
    try:
        metadata = read_metadata(found.files)
    except CheckpointError as error:
        return [str(error)]
    known = {(name, chunk.offset, chunk.length) for name, one in found.manifest.files.items() for chunk in one.chunks}
    wanted = {(place.relative_path, place.offset, place.length) for place in metadata.storage_data.values()}
    return [f"{METADATA} leads to bytes {at} of {name}, which nobody wrote" for name, at, _ in sorted(wanted - known)]
