"""Where an export ends: written aside, then given its name, and never over something that nobody made for this."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshbolt.checkpoint import directory
from meshbolt.errors import CheckpointError, ConfigError
from meshbolt.units import format_bytes

# What a directory holds that an export or a save has made; another one is not replaced, whatever is asked.
_SIGNS = ("manifest.json", ".metadata", "*.safetensors")


def check_output(out: Path, *, source: str, overwrite: bool) -> None:
    """Check that an output may be written.

    Args:
        out: the file or directory to make.
        source: what is read for it.
        overwrite: whether what is there may be replaced.

    Raises:
        ConfigError: there is something and it may not be replaced, or the output would be inside of its source.
    """
    inside = Path(os.path.realpath(out))
    read = Path(os.path.realpath(source))
    if inside == read or read in inside.parents or inside in read.parents:
        raise ConfigError(f"{str(out)!r} and {source!r} lie in each other. Write to another place.")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ConfigError(f"{str(out)!r} exists. Give another path, or --force (overwrite=True) to replace it.")
    if out.is_dir() and not out.is_symlink() and any(out.iterdir()) and not any(any(out.glob(sign)) for sign in _SIGNS):
        raise ConfigError(
            f"{str(out)!r} is a directory that holds no checkpoint and no weights, so it is not replaced even where that is "
            "asked for. Give another path, or remove it yourself."
        )


def check_space(out: Path, *, num_bytes: int) -> None:
    """Check that there is room on the disk.

    Args:
        out: where it is to be written; it and its parents need not exist.
        num_bytes: how much.

    Raises:
        CheckpointError: there is less.
    """
    place = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise CheckpointError(
            f"{str(out)!r} needs {format_bytes(num_bytes)}, and {str(place)!r} has {format_bytes(free)} free. Nothing was "
            "written; make room, or write to another disk."
        )


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a path to write to; when the context ends well, what is there gets its name, else it is removed.

    Args:
        out: what had this name is replaced, in one step where the system can do that.

    Raises:
        CheckpointError: the system refuses.
    """
    partial = directory.partial_of(out, save_id=directory.new_save_id())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        directory.remove_partials(out)  # what an export left that was killed
        yield partial
        directory.commit(partial, target=out)
    except OSError as error:
        raise CheckpointError(f"{str(out)!r} could not be written: {error}.") from error
    finally:
        directory.discard(partial)
    directory.discard(directory.previous_of(out))
