"""Where a checkpoint is: its path, the hidden paths beside it, and the step from one to the other.

A save writes to `.name.ckpt.partial-<id>` and becomes a checkpoint by being renamed. Where a checkpoint of that name
exists already, the two change places in one step of the kernel, if it can; else the old one is first renamed to
`.name.ckpt.previous`, which every reader takes as long as there is none of the name itself. At no moment is there
neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import secrets
import shutil
from pathlib import Path

from meshbolt.checkpoint import manifest
from meshbolt.errors import CheckpointError, UnsupportedError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LOCAL_SCHEMES = ("file", "local")
# The last: what some containers answer to a system call that their filter does not know.
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)

_log = logging.getLogger(__name__)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path for what the user gave: a path, or a URL of this machine's own files.

    Raises:
        UnsupportedError: it is a URL of another kind.
        CheckpointError: it names no directory that could be created.
    """
    text = os.fspath(path)
    if is_remote(text):
        raise UnsupportedError(f"{text!r} is a URL, and only local paths can be used here. Copy the checkpoint to one.")
    if "://" in text:
        text = text.split("://", 1)[1]
    # A link stays a link: it may be replaced as such. The home of nobody stays as it is written.
    absolute = Path(os.path.abspath(os.path.expanduser(text)))  # noqa: PTH100, PTH111
    if not text or not absolute.name:
        raise CheckpointError(f"Checkpoint path {text!r} names no directory. Give one such as 'last.ckpt'.")
    return absolute


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL of a storage other than this machine's own file system."""
    scheme, separator, _ = os.fspath(path).partition("://")
    return bool(separator) and scheme not in _LOCAL_SCHEMES


def partial_of(target: Path, *, save_id: str) -> Path:
    """Return where a save writes until it is whole."""
    return target.with_name(f"{_partial_prefix(target)}{save_id}")


def previous_of(target: Path) -> Path:
    """Return where an existing checkpoint waits while a new one takes its place."""
    return target.with_name(f".{target.name}.previous")


def new_save_id() -> str:
    """Return a name that no other save has."""
    return secrets.token_hex(6)


def find(target: Path) -> Path:
    """Return the directory that holds the checkpoint of this path.

    Raises:
        CheckpointError: there is none, or what is there is no checkpoint.
    """
    previous = previous_of(target)
    found = previous if not target.exists() and manifest.is_manifest(previous / manifest.FILE_NAME) else target
    if not found.exists():
        raise CheckpointError("there is nothing at this path")
    if not found.is_dir():
        raise CheckpointError(
            "it is a file; give the directory that meshbolt saved, not a file in it or of another kind"
        )
    if not (found / manifest.FILE_NAME).exists():
        raise CheckpointError(
            f"it has no {manifest.FILE_NAME}: either meshbolt did not write it, or the save never finished. "
            "Take an earlier checkpoint"
        )
    return found


def remove(target: Path) -> None:
    """Remove a checkpoint and what saves of its name left behind; where there is nothing, do nothing.

    It vanishes in one step: another process that reads it meanwhile gets an error, never a part. A link or a single
    file is removed as such.

    Raises:
        CheckpointError: there is another directory.
    """
    refuse_foreign(target)
    # First, lest a reader takes the previous checkpoint for the one that was just removed.
    discard(previous_of(target))
    remove_partials(target)
    trash = partial_of(target, save_id=new_save_id())
    with contextlib.suppress(FileNotFoundError):
        target.rename(trash)
        sync_directory(target.parent)
        discard(trash)


def refuse_foreign(target: Path) -> None:
    """Check that nobody loses a directory of another kind when a checkpoint takes its place or is removed.

    Raises:
        CheckpointError: there is a directory that has files, and no manifest of meshbolt among them.
    """
    written = target / manifest.FILE_NAME
    if target.is_symlink() or not target.is_dir() or manifest.is_of_meshbolt(written):
        return
    if written.exists() and any(target.glob("*.distcp")):
        return  # its manifest is damaged beyond recognition
    if any(target.iterdir()):
        raise CheckpointError(
            "there is a directory of that name already that is not a checkpoint of meshbolt. "
            "Move it away, or use another name"
        )


def refuse_inside_another(target: Path) -> None:
    """Check that a checkpoint is not to be saved inside another one, with which it would be deleted.

    Raises:
        CheckpointError: it is.
    """
    for parent in target.parents:
        if manifest.is_of_meshbolt(parent / manifest.FILE_NAME):
            raise CheckpointError(
                f"{str(parent)!r} is a checkpoint itself, and what is saved inside goes with it when it is replaced or removed. "
                "Save beside it"
            )


def commit(partial: Path, *, target: Path) -> None:
    """Give a whole, synced partial directory its name; what had the name before is not deleted yet."""
    if not os.path.lexists(target):
        partial.rename(target)
    elif not exchange(partial, target):
        _replace(target, by=partial)
    sync_directory(target.parent)


def _replace(target: Path, *, by: Path) -> None:
    previous = previous_of(target)
    discard(previous)
    target.rename(previous)
    try:
        by.rename(target)
    except OSError:
        previous.rename(target)
        raise


def exchange(first: Path, second: Path) -> bool:
    """Let two directory entries change places in one step; return False where the system cannot do that."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def remove_partials(target: Path) -> None:
    """Delete what saves of this name left behind that were cut short."""
    if not target.parent.is_dir():
        return
    for place in list(target.parent.iterdir()):
        if place.name.startswith(_partial_prefix(target)):
            discard(place)


def discard(place: Path) -> None:
    """Delete a directory, file or link that nothing needs any more; say so in the log where something of it stays."""
    try:
        if place.is_symlink() or place.is_file():
            place.unlink()
            return
        # First, so that a half deleted directory is never taken for a checkpoint.
        (place / manifest.FILE_NAME).unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("%s is not needed any more but cannot be deleted (%s); delete it yourself.", place, error)
        return
    shutil.rmtree(place, ignore_errors=True)
    if place.exists():
        _log.warning("%s is not needed any more but cannot be deleted whole; delete the rest yourself.", place)


def write_synced(file: Path, content: bytes | memoryview) -> None:
    """Write a small file and have its content on the disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"
