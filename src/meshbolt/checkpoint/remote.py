"""Checkpoints on storage that fsspec reaches, where nothing can be renamed in one step: object stores above all.

The manifest alone commits. A save writes to `last.ckpt/data-<id>/`, which no manifest names yet; when all is there, the
manifest is put as `last.ckpt/manifest.json`, one object, in place of the old one, and the folder that the old one named
is deleted. Readers see the old or the new manifest, and each names files of its own save.

Not every storage that fsspec reaches puts an object in one step. A manifest that was torn by a crash is told by its
checksum, and each data folder has a copy of its own: readers then take a folder whose copy is whole, and old and new
are.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, Literal

import fsspec

from meshbolt.checkpoint.manifest import FILE_NAME, Manifest, OtherFormatError, parse_manifest
from meshbolt.checkpoint.storage import Files, Found, check_sizes, write_file
from meshbolt.errors import CheckpointError, MissingPackageError, UnsupportedError

_DATA = "data-"

_log = logging.getLogger(__name__)


def remote_place(url: str, *, storage_options: Mapping[str, Any]) -> RemotePlace:
    """Return the place of a URL.

    Raises:
        CheckpointError: it names no directory that could be created.
        MissingPackageError: the scheme needs a package that is not installed.
        UnsupportedError: nobody knows the scheme.
    """
    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url, **storage_options)
    except ImportError as error:
        raise MissingPackageError(f"Checkpoint {url!r} needs a package that is not installed: {error}.") from error
    except ValueError as error:
        raise UnsupportedError(
            f"Checkpoint {url!r} cannot be reached: fsspec takes no such URL ({error}). Use a local path, or a scheme "
            f"that fsspec knows; {scheme!r} can be made known to it by fsspec.register_implementation."
        ) from error
    if not posixpath.basename(path.rstrip("/")):
        raise CheckpointError(
            f"Checkpoint path {url!r} names no directory. Give one such as '{scheme}://run/last.ckpt'."
        )
    return RemotePlace(url, system, path.rstrip("/"))


@dataclass(frozen=True)
class RemoteFiles:
    """The files in one folder."""

    system: Any
    folder: str

    @contextmanager
    def open(self, name: str, mode: Literal["rb", "wb"]) -> Iterator[IO[bytes]]:
        """Open a file; what was written is an object of the storage when the context has ended."""
        with self.system.open(f"{self.folder}/{name}", mode) as stream:
            yield stream

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return int(self.system.info(f"{self.folder}/{name}")["size"])


@dataclass(frozen=True)
class RemotePlace:
    """A folder, or a common beginning of names, on a storage of fsspec's.

    Attributes:
        text: the URL, as messages name it.
        system: fsspec's file system.
        path: the URL's path, as the file system takes it.
    """

    text: str
    system: Any
    path: str

    def find(self) -> Found:
        """Return the checkpoint that the manifest names; if a crash has torn that, one whose own copy is whole."""
        self.system.invalidate_cache()  # of listings, which other processes have changed
        if self.system.isfile(self.path):
            raise CheckpointError(
                "it is a file; give the folder that meshbolt saved, not a file in it or of another kind"
            )
        if not self.system.isfile(f"{self.path}/{FILE_NAME}"):
            raise CheckpointError(
                f"there is nothing at this path with a {FILE_NAME}: meshbolt did not write it, or the save never "
                "finished. Take an earlier checkpoint"
            )
        try:
            manifest = self._read(self.path)
        except OtherFormatError:
            raise
        except CheckpointError as torn:
            manifest = self._spare(torn)
        return Found(manifest, RemoteFiles(self.system, f"{self.path}/{manifest.folder}"))

    def refuse_foreign(self) -> None:
        """Refuse a file, and a folder of another kind."""
        self.system.invalidate_cache()
        if self.system.isfile(self.path):
            raise CheckpointError("there is a file of that name already. Delete it, or use another name")
        if names := [name for name in self._entries() if name != FILE_NAME and not name.startswith(_DATA)]:
            raise CheckpointError(
                f"there is a folder of that name already that is not a checkpoint of meshbolt (it has {names[0]!r}). "
                "Move it away, or use another name"
            )

    def prepare(self, save_id: str, *, keep_partial: bool) -> None:
        """Delete what failed saves left; a folder of data needs no making."""
        self.refuse_foreign()
        # Which data a manifest of another version names is not known: it all stays until it is replaced.
        with suppress(OtherFormatError):
            if not keep_partial:
                self._discard_data(besides=self._committed())

    def files_of(self, save_id: str) -> Files:
        """Return the save's folder of data."""
        folder = f"{self.path}/{self.folder_of(save_id)}"
        self.system.makedirs(folder, exist_ok=True)
        return RemoteFiles(self.system, folder)

    def folder_of(self, save_id: str) -> str:
        """Return the name of the save's folder of data."""
        return f"{_DATA}{save_id}"

    def settle(self, save_id: str) -> None:
        """Do nothing: what was closed is stored."""

    def commit(self, save_id: str, *, manifest: Manifest) -> None:
        """Check that the storage has all files as they were written, and put the manifest."""
        files = self.files_of(save_id)
        self.system.invalidate_cache()
        check_sizes(Found(manifest, files), names=sorted(manifest.files))
        content = manifest.to_json().encode()
        write_file(files, FILE_NAME, content)
        self.system.pipe_file(f"{self.path}/{FILE_NAME}", content)

    def clean_up(self, save_id: str, *, failed: bool) -> None:
        """Delete the failed save's data, or that of the checkpoint that was replaced."""
        folder = self.folder_of(save_id)
        if not failed:
            self._discard_data(besides=folder)
        elif not self._is_committed(folder):
            self._try_to_delete(f"{self.path}/{folder}")

    def remove(self) -> None:
        """Delete the manifest, with which the checkpoint is gone, then the rest."""
        self.refuse_foreign()
        if self.system.isfile(f"{self.path}/{FILE_NAME}"):
            self.system.rm_file(f"{self.path}/{FILE_NAME}")
        self._delete(self.path)

    def _read(self, folder: str) -> Manifest:
        return parse_manifest(self.system.cat_file(f"{folder}/{FILE_NAME}"))

    def _spare(self, torn: CheckpointError) -> Manifest:
        for name in self._entries():
            with suppress(CheckpointError, OSError):
                if name.startswith(_DATA):
                    return self._read(f"{self.path}/{name}")
        raise torn

    def _committed(self) -> str | None:
        try:
            return self.find().manifest.folder
        except OtherFormatError:
            raise
        except CheckpointError:
            return None

    def _is_committed(self, folder: str) -> bool:
        try:
            return self._committed() == folder
        except OtherFormatError:
            return False

    def _entries(self) -> list[str]:
        try:
            found = self.system.ls(self.path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(str(path).rstrip("/")) for path in found if str(path).rstrip("/") != self.path)

    def _discard_data(self, *, besides: str | None) -> None:
        for name in self._entries():
            if name.startswith(_DATA) and name != besides:
                self._try_to_delete(f"{self.path}/{name}")

    def _try_to_delete(self, path: str) -> None:
        try:
            self._delete(path)
        except Exception as error:  # a storage has errors of many classes
            _log.warning("%s is not needed any more but cannot be deleted (%s); delete it yourself.", path, error)

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.system.rm(path, recursive=True)
