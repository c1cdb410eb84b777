"""The manifest: the small JSON file that makes a directory a checkpoint.

It is written last, when every other file is safely on the storage. Its layout:

    {
      "format": "meshbolt.checkpoint",
      "format_version": 3,
      "save_id": "5f0c2a9b",                               this save's own name
      "folder": "",                                        where the other files are, from here
      "world_size": 4,
      "versions": {"meshbolt": "0.1.0", "torch": "2.13.0"},
      "plan": {"zero.stage": 3},                           what the run was told to do, as plain data
      "algorithm": "words64-blake2b64",                   of the checksums: `checksum.py`
      "files": {
        "__0_0.distcp": {"bytes": 1536, "chunks": [[0, 1536, 576, "adb0e38c693ef421"]]}
      },
      "tensors": {
        "model.w": {"shape": [8, 4], "dtype": "float32", "placement": "Shard(dim=0) over dp_shard=4"}
      },
      "checksum": "a12f30de3aa598b3"                       of all bytes before this line
    }

Chunks cover a file from its first byte to its last; of each there is the offset in the file, the length, where in the
chunk the values of a tensor begin, and the checksum. `files` names every other file of the checkpoint.

A reader ignores keys it does not know, so that more can be said about a file, or beside the files, under the same
format version; what an older reader must not misread raises the version. The last line and the checksum in it stay in
every version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from meshbolt.checkpoint.checksum import ALGORITHM, checksum_of
from meshbolt.errors import CheckpointError
from meshbolt.version import __version__

FORMAT = "meshbolt.checkpoint"
FORMAT_VERSION = 3
FILE_NAME = "manifest.json"

# Of which damage seldom reaches more than one.
_WORDS = (FORMAT, "format_version", "save_id", "world_size", "versions")
_SEAL = ',\n  "checksum": "'
_END = '"\n}\n'
_SEAL_LENGTH = len(_SEAL) + 16 + len(_END)


class OtherFormatError(CheckpointError):
    """A checkpoint is whole, and of a format that another version of meshbolt reads."""


class Chunk(NamedTuple):
    """A run of bytes with a checksum of its own: what was saved of one tensor by one rank, or a whole file.

    Attributes:
        offset: where in the file it begins.
        length: how many bytes it is.
        values: where in the chunk the tensor's values begin, in row-major order; 0 in other files.
        checksum: of all its bytes.
    """

    offset: int
    length: int
    values: int
    checksum: str


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file.

    Attributes:
        num_bytes: its size.
        chunks: what it consists of, by offset.
    """

    num_bytes: int
    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, content: bytes | memoryview) -> FileRecord:
        """Return the record of a file that is one chunk."""
        return cls(len(content), (Chunk(0, len(content), 0, checksum_of(content)),))

    def check(self, content: bytes, *, name: str) -> None:
        """Compare the content of a file that is one chunk with this record.

        Raises:
            CheckpointError: it is another content.
        """
        if FileRecord.of(content) != self:
            raise damaged(name)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a manifest says.

    Attributes:
        save_id: a name of this save alone, equal for all ranks that read the same checkpoint.
        world_size: number of ranks that wrote it.
        versions: of the packages that wrote it, by name.
        plan: what the run was told to do, as plain data.
        files: every other file, by its name.
        tensors: by key, shape, dtype and placement as plain data, for people and tools to read.
        folder: where the files are, relative to the manifest; empty for beside it.
    """

    save_id: str
    world_size: int
    versions: Mapping[str, str]
    plan: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""

    def to_json(self) -> str:
        """Return the manifest as it is written.

        Raises:
            CheckpointError: the plan holds what JSON cannot.
        """
        plain = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "save_id": self.save_id,
            "folder": self.folder,
            "world_size": self.world_size,
            "versions": dict(self.versions),
            "plan": dict(self.plan),
            "algorithm": ALGORITHM,
        }
        files = {name: {"bytes": one.num_bytes, "chunks": one.chunks} for name, one in sorted(self.files.items())}
        try:
            lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in plain.items()]
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the plan cannot be written to {FILE_NAME} ({error}); use plain values in it"
            ) from error
        lines += [_entries("files", files), _entries("tensors", dict(sorted(self.tensors.items())))]
        return seal("{\n" + ",\n".join(lines))


def seal(body: str) -> str:
    """Return a JSON object, given without its end, with the checksum of itself as its last entry."""
    return f"{body}{_SEAL}{checksum_of(body.encode())}{_END}"


def _entries(key: str, entries: Mapping[str, Any]) -> str:
    """Return a mapping with a line for each entry: a checkpoint may have many."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())
    return f"  {json.dumps(key)}: {{\n{lines}\n  }}" if entries else f"  {json.dumps(key)}: {{}}"


def damaged(name: str) -> CheckpointError:
    """Return the error for a file whose bytes are not those that were saved."""
    return CheckpointError(
        f"its file {name} is damaged: the checksum of what is there is not that of what was saved. "
        "Take an earlier checkpoint"
    )


def own_versions() -> dict[str, str]:
    """Return the versions of meshbolt and torch that run."""
    return {"meshbolt": __version__, "torch": str(torch.__version__)}


def is_manifest(file: Path) -> bool:
    """Return whether a file is the whole manifest of a checkpoint, of any format version."""
    try:
        _content(file.read_bytes())
    except (CheckpointError, OSError):
        return False
    return True


def is_of_meshbolt(file: Path) -> bool:
    """Return whether a file is a manifest, whole or damaged: many programs have files of that name."""
    try:
        written = file.read_bytes()
    except OSError:
        return False
    return sum(f'"{word}"'.encode() in written for word in _WORDS) > len(_WORDS) // 2


def read_manifest(file: Path) -> Manifest:
    """Read a manifest.

    Raises:
        CheckpointError: it is damaged, or of a format that this version does not know.
    """
    return parse_manifest(file.read_bytes())


def parse_manifest(written: bytes) -> Manifest:
    """Return what the bytes of a manifest say.

    Raises:
        CheckpointError: they are damaged, or of a format that this version does not know.
    """
    content = _content(written)
    version = content.get("format_version")
    if version != FORMAT_VERSION or content.get("algorithm") != ALGORITHM:
        raise OtherFormatError(
            f"its format is version {version!r} with checksums {content.get('algorithm')!r}, written by meshbolt "
            f"{_author(content)}, and this version of meshbolt reads version {FORMAT_VERSION} with {ALGORITHM!r}. "
            f"{'Upgrade meshbolt' if not isinstance(version, int) or version >= FORMAT_VERSION else 'Use the older one'} "
            "to read it"
        )
    try:
        return Manifest(
            save_id=str(content["save_id"]),
            world_size=int(content["world_size"]),
            versions=dict(content["versions"]),
            plan=dict(content["plan"]),
            files={name: _record(entry) for name, entry in content["files"].items()},
            tensors=dict(content["tensors"]),
            folder=str(content["folder"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"its {FILE_NAME} is damaged ({type(error).__name__}: {error})") from error


def _record(entry: Mapping[str, Any]) -> FileRecord:
    chunks = tuple(Chunk(int(one[0]), int(one[1]), int(one[2]), str(one[3])) for one in entry["chunks"])
    return FileRecord(int(entry["bytes"]), chunks)


def _content(written: bytes) -> dict[str, Any]:
    try:
        content = json.loads(written.decode())
    except ValueError as error:  # of JSON, or of UTF-8
        raise CheckpointError(f"its {FILE_NAME} is damaged ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"its {FILE_NAME} is not one of meshbolt's")
    # Version 1 had no checksums at all; it was never released.
    if content.get("format_version") != 1 and not _is_sealed(written):
        raise CheckpointError(f"its {FILE_NAME} is damaged: its checksum is not that of what it says")
    return content


def _is_sealed(written: bytes) -> bool:
    body, seal = written[:-_SEAL_LENGTH], written[-_SEAL_LENGTH:]
    return seal == f"{_SEAL}{checksum_of(body)}{_END}".encode()


def _author(content: dict[str, Any]) -> Any:
    versions = content.get("versions")
    return versions.get("meshbolt", "of an unknown version") if isinstance(versions, dict) else "of an unknown version"
