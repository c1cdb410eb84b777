"""What a checkpoint needs of the storage it lies on: the one seam between saving and loading and any kind of storage.

`local.py` implements it for directories, `remote.py` for whatever fsspec reaches; `places.py` chooses.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Literal, Protocol

from meshbolt.checkpoint.manifest import Manifest
from meshbolt.errors import CheckpointError


class Files(Protocol):
    """The files of one save, all in one folder."""

    def open(self, name: str, mode: Literal["rb", "wb"]) -> AbstractContextManager[IO[bytes]]:
        """Open a file; one that was written is safe on the storage when the context has ended without an error."""

    def size(self, name: str) -> int:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: there is none of that name.
        """


@dataclass(frozen=True)
class Found:
    """A checkpoint that is there.

    Attributes:
        manifest: what it says of itself.
        files: all other files of it.
    """

    manifest: Manifest
    files: Files


class Place(Protocol):
    """Where the checkpoint of one path is, and how a save becomes it.

    A save calls on its ranks, in this order: `prepare` (first rank), `files_of`, `settle`, `commit` (first rank), and
    `clean_up` (first rank) in the end, whatever happened.
    """

    @property
    def text(self) -> str:
        """The path, as messages name it."""

    def find(self) -> Found:
        """Return the checkpoint.

        Raises:
            CheckpointError: there is none, or what is there is no whole checkpoint.
        """

    def refuse_foreign(self) -> None:
        """Check that a save would replace nothing but a checkpoint.

        Raises:
            CheckpointError: something else is there.
        """

    def prepare(self, save_id: str, *, keep_partial: bool) -> None:
        """Make room for a save, once it is sure that it would replace nothing but a checkpoint.

        Args:
            save_id: the save's own name.
            keep_partial: leave what saves of this path that failed have left.

        Raises:
            CheckpointError: something else is there.
        """

    def files_of(self, save_id: str) -> Files:
        """Return where a save writes to; called on every rank.

        Raises:
            CheckpointError: this rank does not see what the first one has prepared.
        """

    def folder_of(self, save_id: str) -> str:
        """Return what the manifest says of where the save's files are, relative to itself."""

    def settle(self, save_id: str) -> None:
        """Have the names of the files that this rank wrote safe on the storage."""

    def commit(self, save_id: str, *, manifest: Manifest) -> None:
        """Make the save the checkpoint of this path, in place of what was."""

    def clean_up(self, save_id: str, *, failed: bool) -> None:
        """Delete what nobody needs any more: the failed save, or what the save has replaced."""

    def remove(self) -> None:
        """Remove the checkpoint and all that saves of this path left; do nothing where there is nothing.

        Raises:
            CheckpointError: something else is there.
        """


def read_file(files: Files, name: str) -> bytes:
    """Return the content of a small file."""
    with files.open(name, "rb") as stream:
        return stream.read()


def write_file(files: Files, name: str, content: bytes | memoryview) -> None:
    """Write a small file and have it safe on the storage."""
    with files.open(name, "wb") as stream:
        stream.write(content)


def check_sizes(found: Found, *, names: list[str]) -> None:
    """Compare files on the storage with what the manifest says of them.

    Args:
        found: the checkpoint.
        names: which of the manifest's files to look at.

    Raises:
        CheckpointError: a file is missing or has another size.
    """
    for name in names:
        try:
            size = found.files.size(name)
        except FileNotFoundError:
            raise CheckpointError(f"its file {name} is missing") from None
        expected = found.manifest.files[name].num_bytes
        if size != expected:
            raise CheckpointError(f"its file {name} has {size} bytes instead of {expected}: it is damaged")
