"""Which storage a path means, and what can be asked of any of them without other ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from meshbolt.checkpoint.directory import is_remote, local_path
from meshbolt.checkpoint.local import LocalPlace
from meshbolt.checkpoint.manifest import OtherFormatError
from meshbolt.checkpoint.remote import remote_place
from meshbolt.checkpoint.storage import Place
from meshbolt.errors import CheckpointError, ConfigError


def place_of(path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> Place:
    """Return the place that a path means.

    Args:
        path: a local path, or a URL of any scheme that fsspec knows; `file://` and `local://` are local paths.
        storage_options: what fsspec passes to the file system of a URL, such as credentials.

    Raises:
        CheckpointError: it names no directory that could be created.
        ConfigError: there are options for a local path.
        MissingPackageError: the scheme needs a package that is not installed.
        UnsupportedError: nobody knows the scheme.
    """
    if is_remote(path):
        return remote_place(os.fspath(path), storage_options=storage_options or {})
    if storage_options:
        raise ConfigError(
            f"storage_options={sorted(storage_options)} were given for {os.fspath(path)!r}, and a local path takes "
            "none. Leave them out, or give a URL such as 's3://bucket/last.ckpt'."
        )
    return LocalPlace(local_path(path))


def name_of(path: str | os.PathLike[str]) -> str:
    """Return one text for all ways to write a path, or a URL with and without a slash at its end.

    Raises:
        CheckpointError: it names no directory that could be created.
    """
    return os.fspath(path).rstrip("/") if is_remote(path) else str(local_path(path))


def is_checkpoint(path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Return whether there is a checkpoint at a path, whole as far as its manifest tells; it asks no other rank.

    Args:
        path: a local path or a URL.
        storage_options: what fsspec passes to the file system of a URL.
    """
    try:
        place_of(path, storage_options=storage_options).find()
    except OtherFormatError:
        return True
    except (CheckpointError, OSError):
        return False
    return True


def remove_directory(path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
    """Remove a checkpoint and what saves of its name left behind; where there is nothing, do nothing.

    It vanishes in one step: another process that reads it meanwhile gets an error, never a part. A link or a single
    file is removed as such. Call it on one rank.

    Args:
        path: a local path or a URL.
        storage_options: what fsspec passes to the file system of a URL.

    Raises:
        CheckpointError: there is another directory, or the system refuses.
    """
    place = place_of(path, storage_options=storage_options)
    try:
        place.remove()
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"Checkpoint {place.text!r} cannot be removed: {error}.") from error
