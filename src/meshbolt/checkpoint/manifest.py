"""The manifest: the small JSON file that makes a directory a checkpoint.

It is written last, when every other file is safely on the disk. Its layout:

    {
      "format": "meshbolt.checkpoint",
      "format_version": 1,
      "save_id": "5f0c2a9b",                               this save's own name
      "world_size": 4,
      "versions": {"meshbolt": "0.1.0", "torch": "2.13.0"},
      "plan": {"zero.stage": 3},                           what the run was told to do, as plain data
      "files": {"__0_0.distcp": {"bytes": 1024}}           every other file of the directory
    }

A reader ignores keys it does not know, so that more can be said about a file, or beside the files, under the same
format version; what an older reader must not misread raises the version.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meshbolt.errors import CheckpointError

FORMAT = "meshbolt.checkpoint"
FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a manifest says.

    Attributes:
        save_id: a name of this save alone, equal for all ranks that read the same checkpoint.
        world_size: number of ranks that wrote it.
        versions: of the packages that wrote it, by name.
        plan: what the run was told to do, as plain data.
        files: bytes of every other file, by its name.
    """

    save_id: str
    world_size: int
    versions: Mapping[str, str]
    plan: Mapping[str, Any]
    files: Mapping[str, int]

    def to_json(self) -> str:
        """Return the manifest as it is written.

        Raises:
            CheckpointError: the plan holds what JSON cannot.
        """
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "save_id": self.save_id,
            "world_size": self.world_size,
            "versions": dict(self.versions),
            "plan": dict(self.plan),
            "files": {name: {"bytes": num_bytes} for name, num_bytes in sorted(self.files.items())},
        }
        try:
            return json.dumps(content, indent=2) + "\n"
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the plan cannot be written to {FILE_NAME} ({error}); use plain values in it"
            ) from error

    def check_files(self, directory: Path, *, names: Iterable[str]) -> None:
        """Compare files on the disk with what the manifest says of them.

        Args:
            directory: where they are.
            names: which of the manifest's files to look at.

        Raises:
            CheckpointError: a file is missing or has another size.
        """
        for name in names:
            try:
                found = (directory / name).stat().st_size
            except FileNotFoundError:
                raise CheckpointError(f"its file {name} is missing") from None
            if found != self.files[name]:
                raise CheckpointError(f"its file {name} has {found} bytes instead of {self.files[name]}: it is damaged")


def own_versions() -> dict[str, str]:
    """Return the versions of meshbolt and torch that run."""
    return {"meshbolt": importlib.metadata.version("meshbolt"), "torch": str(torch.__version__)}


def is_manifest(file: Path) -> bool:
    """Return whether a file is the whole manifest of a checkpoint, of any format version."""
    try:
        _content(file)
    except (CheckpointError, OSError):
        return False
    return True


def read_manifest(file: Path) -> Manifest:
    """Read a manifest.

    Raises:
        CheckpointError: it is damaged, or of a format that this version does not know.
    """
    content = _content(file)
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"its format version is {version!r}, written by meshbolt {_author(content)}, and this version of meshbolt "
            f"reads formats up to {FORMAT_VERSION}. Upgrade meshbolt to read it"
        )
    try:
        return Manifest(
            save_id=str(content["save_id"]),
            world_size=int(content["world_size"]),
            versions=dict(content["versions"]),
            plan=dict(content["plan"]),
            files={name: int(entry["bytes"]) for name, entry in content["files"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"its {file.name} is damaged ({type(error).__name__}: {error})") from error


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise CheckpointError(f"its {file.name} is damaged ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"its {file.name} is not one of meshbolt's")
    return content


def _author(content: dict[str, Any]) -> Any:
    versions = content.get("versions")
    return versions.get("meshbolt", "of an unknown version") if isinstance(versions, dict) else "of an unknown version"
