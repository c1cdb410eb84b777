"""Export a checkpoint to a format, and import one from a format: checked first, then written aside and given its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from meshbolt.checkpoint.directory import is_remote, local_path
from meshbolt.checkpoint.formats.options import ExportOptions, OnBytes, Readable, Source, SourceReader, Writer
from meshbolt.checkpoint.formats.output import check_output, check_space, written_aside
from meshbolt.checkpoint.formats.table import FORMATS, SOURCES, Format
from meshbolt.checkpoint.lazy import observed
from meshbolt.checkpoint.metadata import FILE_NAME as METADATA
from meshbolt.checkpoint.objects import FILE_NAME as OBJECTS
from meshbolt.checkpoint.places import is_checkpoint
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.checkpoint.save import save_directory
from meshbolt.errors import CheckpointError, ConfigError, did_you_mean

_ROOM_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What an export or import has done.

    Attributes:
        source: what was read.
        out: what was written.
        format: the foreign format.
        num_tensors: how many tensors.
        num_bytes: of all of them.
        notes: what the user should know, as sentences.
    """

    source: str
    out: str
    format: str
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who wants to know how far a conversion is.

    Attributes:
        on_total: called once with the bytes that there will be.
        on_bytes: called with the bytes of each tensor when it is done.
    """

    on_total: OnBytes = lambda _: None
    on_bytes: OnBytes = lambda _: None


def export_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    options: ExportOptions | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> Conversion:
    """Write a checkpoint in another format, tensor by tensor, in this process alone.

    Args:
        path: the checkpoint's directory; one of DeepSpeed's, too.
        out: the file or directory to make.
        to: a name in `FORMATS`.
        options: what is exported.
        overwrite: whether what is at `out` may be replaced, in one step when the export is whole.
        watch: is told how far it is.

    Raises:
        CheckpointError: the checkpoint cannot be read, or there is not enough room.
        ConfigError: the format is unknown, an option does not go with it, or `out` may not be written.
        UnsupportedError: the format cannot hold a tensor, or a path is a URL.
    """
    options, watch, target = options or ExportOptions(), watch or Watch(), local_path(out)
    chosen = _format(to)
    format_read = _exported_as_it_is(path)
    options.refuse_others(chosen.options | ({"weights_only"} if format_read else set()), to=to)
    with _opened(path, options, format_read) as (reader, notes, num_bytes_beside):
        check_output(target, source=reader.name, overwrite=overwrite)
        writer = _writer(chosen, reader, options, target)
        check_space(target, num_bytes=writer.num_bytes + num_bytes_beside)
        watch.on_total(writer.num_bytes)
        with written_aside(target) as partial:
            writer.write(partial, on_bytes=watch.on_bytes)
    return Conversion(
        source=reader.name,
        out=str(target),
        format=to,
        num_tensors=writer.num_tensors,
        num_bytes=writer.num_bytes,
        notes=(*notes, *writer.notes),
    )


@contextmanager
def _opened(
    path: str | os.PathLike[str], options: ExportOptions, format_read: str | None
) -> Iterator[tuple[Readable, tuple[str, ...], int]]:
    """Yield what is exported, what the user should know of it, and room for all in it that is no tensor."""
    if format_read is None:
        with CheckpointReader(path) as reader:
            yield reader, (), _beside(reader)
        return
    place = local_path(path)
    found = SOURCES[format_read].read(place, prefix="", weights_only=options.weights_only)
    with found.closing:
        yield SourceReader(found, name=str(place)), found.notes, _ROOM_BYTES


def _exported_as_it_is(path: str | os.PathLike[str]) -> str | None:
    """Return the format of what is no checkpoint of meshbolt's and is exported all the same."""
    if is_remote(path) or is_checkpoint(path):
        return None
    return next((name for name, each in SOURCES.items() if each.is_exported and each.recognises(Path(path))), None)


def _beside(reader: CheckpointReader) -> int:
    """Return room for all that is no tensor."""
    records = [reader.manifest.files.get(name) for name in (METADATA, OBJECTS)]
    return _ROOM_BYTES + sum(2 * record.num_bytes for record in records if record is not None)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"{name!r} is not a format that checkpoints are exported to{did_you_mean(name, FORMATS)}.")
    return FORMATS[name]


def _writer(chosen: Format, reader: Readable, options: ExportOptions, target: Path) -> Writer:
    if chosen.file_writer is None or target.suffix != chosen.suffix:
        return chosen.writer(reader, options)
    if options.max_shard_bytes != ExportOptions.max_shard_bytes:
        raise ConfigError(
            f"{str(target)!r} is to be one file, which max_shard_bytes={options.max_shard_bytes} does not divide. Leave it out, "
            f"or give a directory: a path without {chosen.suffix}."
        )
    return chosen.file_writer(reader, options)


def import_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    tag: str | None = None,
    prefix: str = "",
    weights_only: bool | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> Conversion:
    """Make a checkpoint of meshbolt's from a file or directory of another format, in this process alone.

    Args:
        source: of one of the formats in `SOURCES`.
        out: the directory to make.
        format: its name in `SOURCES`; None: it is found by looking.
        tag: which of the saves in the source; None: the latest, or the only one.
        prefix: what is put before each weight's name: the attribute of the LightningModule that they belong to, with a dot.
        weights_only: False builds objects of any class, which runs code from the source; else plain data only.
        overwrite: whether what is at `out` may be replaced, in one step when the import is whole.
        watch: is told how far it is.

    Raises:
        CheckpointError: the source cannot be read, or there is not enough room.
        ConfigError: the source is not of that format, or of none that is known, it has no tags, or `out` may not be written.
        UnsupportedError: a path is a URL, or torch does not have a dtype.
    """
    watch, place, target = watch or Watch(), local_path(source), local_path(out)
    name = recognise(place) if format is None else _named(format, place)
    check_output(target, source=str(place), overwrite=overwrite)
    found = _read(place, name, tag=tag, prefix=prefix, weights_only=weights_only)
    with found.closing:
        num_bytes = sum(tensor.nbytes for tensor in found.tensors.values())
        check_space(target, num_bytes=num_bytes + _ROOM_BYTES)
        watch.on_total(num_bytes)
        _save(found, target, name=name, place=place, on_bytes=watch.on_bytes)
    return Conversion(
        source=str(place),
        out=str(target),
        format=name,
        num_tensors=len(found.tensors),
        num_bytes=num_bytes,
        notes=found.notes,
    )


def recognise(place: Path) -> str:
    """Return the name of the format that something is of.

    Args:
        place: a file or directory.

    Raises:
        CheckpointError: there is nothing.
        ConfigError: it is of no known format, or a checkpoint of meshbolt's already.
    """
    if not place.exists():
        raise CheckpointError(f"{str(place)!r} cannot be imported: there is nothing at this path.")
    if is_checkpoint(place):
        raise ConfigError(f"{str(place)!r} is a checkpoint of meshbolt's already. Use it as it is, or export it.")
    for name, known in SOURCES.items():
        if known.recognises(place):
            return name
    listed = "; ".join(known.help for known in SOURCES.values())
    raise ConfigError(f"{str(place)!r} is of no format that is imported. Known: {listed}.")


def _named(name: str, place: Path) -> str:
    """Return the name of a format that somebody says the source has."""
    if name not in SOURCES:
        raise ConfigError(f"{name!r} is not a format that checkpoints are imported from{did_you_mean(name, SOURCES)}.")
    is_other = not SOURCES[name].recognises(place)
    if is_other and (found := recognise(place)) != name:
        raise ConfigError(f"{str(place)!r} is {SOURCES[found].help}, and not of the format {name!r}. Leave that out.")
    return name


def _read(place: Path, name: str, *, tag: str | None, prefix: str, weights_only: bool | None) -> Source:
    chosen = SOURCES[name]
    if tag is None:
        return chosen.read(place, prefix=prefix, weights_only=weights_only)
    if chosen.read_tag is None:
        raise ConfigError(
            f"tag={tag!r} chooses among several saves, and {str(place)!r} is {chosen.help}. Leave it out."
        )
    return chosen.read_tag(place, prefix=prefix, weights_only=weights_only, tag=tag)


def _save(found: Source, target: Path, *, name: str, place: Path, on_bytes: OnBytes) -> None:
    if os.path.lexists(target) and not is_checkpoint(target):
        raise ConfigError(
            f"{str(target)!r} is no checkpoint of meshbolt's, and only such is replaced. Remove it yourself."
        )
    save_directory(
        target,
        tensors={key: observed(tensor, on_bytes) for key, tensor in found.tensors.items()},
        objects=found.objects,
        plan={"imported.format": name, "imported.from": str(place)},
    )
