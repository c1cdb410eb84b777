"""A second name for a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from meshbolt.checkpoint import directory
from meshbolt.errors import UnsupportedError


def make_link(path: str | os.PathLike[str], *, to: str | os.PathLike[str]) -> None:
    """Make a path a link to a checkpoint; a checkpoint, link or file of that name is replaced in one step.

    Args:
        path: of the link.
        to: where it leads; there may be nothing yet.

    Raises:
        CheckpointError: there is a directory of another kind at the path.
        UnsupportedError: one of them is a URL.
    """
    for place in (path, to):
        if directory.is_remote(place):
            raise UnsupportedError(
                f"{os.fspath(place)!r} is a URL, and only local file systems have links. Save the checkpoint under both "
                'names instead: ModelCheckpoint(save_last=True) in place of save_last="link".'
            )
    link, target = directory.local_path(path), directory.local_path(to)
    if link == target:
        return
    directory.refuse_foreign(link)
    directory.remove_partials(link)
    beside = directory.partial_of(link, save_id=directory.new_save_id())
    beside.symlink_to(Path(os.path.relpath(target, link.parent)))
    try:
        directory.commit(beside, target=link)
    finally:
        directory.discard(beside)
    directory.discard(directory.previous_of(link))
