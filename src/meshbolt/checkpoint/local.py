"""Checkpoints in local directories, or on any file system that is mounted: `Place` and `Files` over `directory.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from meshbolt.checkpoint import directory
from meshbolt.checkpoint.manifest import FILE_NAME, Manifest, read_manifest
from meshbolt.checkpoint.storage import Files, Found, check_sizes
from meshbolt.errors import CheckpointError


@dataclass(frozen=True)
class LocalFiles:
    """The files in one directory."""

    directory: Path

    @contextmanager
    def open(self, name: str, mode: Literal["rb", "wb"]) -> Iterator[IO[bytes]]:
        """Open a file; what was written is on the disk when the context has ended."""
        with (self.directory / name).open(mode) as stream:
            yield stream
            if mode == "wb":
                stream.flush()
                os.fsync(stream.fileno())

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return (self.directory / name).stat().st_size


@dataclass(frozen=True)
class LocalPlace:
    """A path in a file system that can rename."""

    target: Path

    @property
    def text(self) -> str:
        """The path, as messages name it."""
        return str(self.target)

    def find(self) -> Found:
        """Return the checkpoint, or the previous one while a new one takes its place."""
        try:
            return self._look()
        except FileNotFoundError:  # it was replaced between two looks at it
            return self._look()

    def refuse_foreign(self) -> None:
        """Refuse a directory of another kind."""
        directory.refuse_foreign(self.target)

    def prepare(self, save_id: str, *, keep_partial: bool) -> None:
        """Make the directory that the save writes to."""
        self.refuse_foreign()
        directory.refuse_inside_another(self.target)
        if not keep_partial:
            directory.remove_partials(self.target)
        self._partial(save_id).mkdir(parents=True)

    def files_of(self, save_id: str) -> Files:
        """Return the partial directory, once it is there for this rank as well."""
        partial = self._partial(save_id)
        if not partial.is_dir():
            raise CheckpointError(
                f"{str(partial)!r} was made by the first rank and is not there for this one. "
                "Save to a file system that all machines share, by the same path"
            )
        return LocalFiles(partial)

    def folder_of(self, save_id: str) -> str:
        """Return that the files lie beside the manifest."""
        return ""

    def settle(self, save_id: str) -> None:
        """Bring the names in the partial directory to the disk."""
        directory.sync_directory(self._partial(save_id))

    def commit(self, save_id: str, *, manifest: Manifest) -> None:
        """Write the manifest, and give the directory its name."""
        partial = self._partial(save_id)
        check_sizes(Found(manifest, LocalFiles(partial)), names=sorted(manifest.files))
        directory.write_synced(partial / FILE_NAME, manifest.to_json().encode())
        directory.sync_directory(partial)
        directory.commit(partial, target=self.target)

    def clean_up(self, save_id: str, *, failed: bool) -> None:
        """Delete the partial directory, and after a commit what the checkpoint has replaced."""
        directory.discard(self._partial(save_id))
        if not failed:
            directory.discard(directory.previous_of(self.target))

    def remove(self) -> None:
        """Remove the directory in one step."""
        directory.remove(self.target)

    def _look(self) -> Found:
        found = directory.find(self.target)
        return Found(read_manifest(found / FILE_NAME), LocalFiles(found))

    def _partial(self, save_id: str) -> Path:
        return directory.partial_of(self.target, save_id=save_id)


def files_at(files: Path | Files) -> Files:
    """Return the files of a directory, or what is that already."""
    return LocalFiles(files) if isinstance(files, Path) else files
