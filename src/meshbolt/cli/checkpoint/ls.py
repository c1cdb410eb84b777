"""`meshbolt checkpoint ls`: the checkpoints below a directory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from meshbolt.callbacks.console import print_table, write_line
from meshbolt.checkpoint import is_checkpoint
from meshbolt.checkpoint.deepspeed import is_deepspeed_save, open_deepspeed
from meshbolt.checkpoint.foreign import RefusedClassesError
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.cli.checkpoint.arguments import parser_of
from meshbolt.cli.checkpoint.deepspeed import size_and_time
from meshbolt.cli.checkpoint.told import short, tell_json
from meshbolt.cli.commands import DONE, NO
from meshbolt.errors import CheckpointError, MeshboltError
from meshbolt.units import format_bytes

_COLUMNS = ("checkpoint", "step", "epoch", "size", "ranks", "zero", "saved")
_PREVIOUS = ".previous"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is listed of one checkpoint.

    Attributes:
        path: where it is.
        step: optimizer steps done; None where it does not say.
        epoch: its epoch; None where it does not say.
        num_bytes: of all its files.
        ranks: how many wrote it.
        zero: the stage that wrote it; None for an import.
        saved: when.
        fault: why it cannot be read; None where it can.
        not_allowed: full names of classes in it, for which it was not read; nothing is known to be wrong with it.
        by: what wrote it: "meshbolt" or "deepspeed".
    """

    path: str
    step: int | None = None
    epoch: int | None = None
    num_bytes: int = 0
    ranks: int = 0
    zero: int | None = None
    saved: str = ""
    fault: str | None = None
    not_allowed: tuple[str, ...] = ()
    by: str = "meshbolt"


def run(arguments: Sequence[str]) -> int:
    """List checkpoints; return 1 where there is none.

    Args:
        arguments: "ls", then the directory and flags.

    Raises:
        CheckpointError: there is no such directory.
    """
    parser = parser_of(
        "ls",
        usage="[DIR] [--json]",
        description="List the checkpoints below a directory, the latest last. Exit code 1 where there is none.",
        example="lightning_logs",
    )
    parser.add_argument("directory", nargs="?", default=".", help="where to look; this directory if left out")
    options = parser.parse_args(list(arguments[1:]))
    folder = Path(options.directory)
    if not folder.is_dir():
        raise CheckpointError(f"{options.directory!r} is no directory. Give one that checkpoints were saved below.")
    entries = sorted(map(entry_of, checkpoints_below(folder)), key=lambda entry: (entry.saved, entry.path))
    if options.json:
        tell_json([dataclasses.asdict(entry) for entry in entries])
    elif entries:
        print_table("checkpoints", columns=_COLUMNS, rows=[_row(entry) for entry in entries])
    else:
        write_line(f"no checkpoint below {options.directory}")
    return DONE if entries else NO


def checkpoints_below(folder: Path) -> Iterator[Path]:
    """Yield the paths of all checkpoints in a directory and those below it, hidden ones left out."""
    if is_checkpoint(folder) or is_deepspeed_save(folder):
        yield folder
        return
    for place in sorted(folder.iterdir()):
        if place.name.startswith("."):
            # The last one of its name, should a save have been killed between two renames.
            name = place.with_name(place.name[1:].removesuffix(_PREVIOUS))
            if place.name.endswith(_PREVIOUS) and not name.exists() and is_checkpoint(name):
                yield name
        elif place.is_dir() and not place.is_symlink():
            yield from checkpoints_below(place)


def entry_of(path: Path) -> Entry:
    """Return what is listed of a checkpoint, damaged or not."""
    if is_deepspeed_save(path) and not is_checkpoint(path):
        return _entry_of_deepspeeds(path)
    try:
        with CheckpointReader(path) as reader:
            manifest = reader.manifest
            objects = _objects(reader)
    except CheckpointError as error:
        return Entry(path=str(path), fault=str(error))
    files = [record.num_bytes for record in manifest.files.values()]
    place = path if path.exists() else path.with_name(f".{path.name}{_PREVIOUS}")
    return Entry(
        path=str(path),
        step=objects.get("global_step"),
        epoch=objects.get("epoch"),
        num_bytes=sum(files),
        ranks=manifest.world_size,
        zero=manifest.plan.get("zero.stage"),
        saved=datetime.fromtimestamp(os.stat(place / "manifest.json").st_mtime).strftime("%Y-%m-%d %H:%M:%S"),  # noqa: PTH116
    )


def _entry_of_deepspeeds(path: Path) -> Entry:
    num_bytes, saved = size_and_time(path)
    try:
        opened = open_deepspeed(path)
    except MeshboltError as error:
        if isinstance(error.__cause__, RefusedClassesError):
            classes = error.__cause__.classes
            return Entry(path=str(path), num_bytes=num_bytes, saved=saved, not_allowed=classes, by="deepspeed")
        return Entry(path=str(path), fault=str(error), by="deepspeed")
    epoch = opened.client_state.get("epoch") if opened.is_lightnings else None
    return Entry(
        path=str(path),
        step=opened.global_steps,
        epoch=epoch,
        num_bytes=num_bytes,
        ranks=opened.world,
        zero=opened.stage,
        saved=saved,
        by="deepspeed",
    )


def _objects(reader: CheckpointReader) -> dict[str, Any]:
    try:
        return reader.objects()
    except CheckpointError:
        return {}  # it holds objects of classes, and a list is no reason to run them


def _row(entry: Entry) -> tuple[str, ...]:
    if entry.fault is not None:
        return (short(entry.path), *["-"] * 5, f"damaged: {entry.fault}")
    if entry.not_allowed:
        why = f"by DeepSpeed, not read: classes {', '.join(entry.not_allowed)} (see inspect)"
        return (short(entry.path), "-", "-", format_bytes(entry.num_bytes), "-", "-", f"{entry.saved} {why}")
    numbers = [
        _known(entry.step),
        _known(entry.epoch),
        format_bytes(entry.num_bytes),
        str(entry.ranks),
        _known(entry.zero),
    ]
    return (short(entry.path), *numbers, entry.saved + (" by DeepSpeed" if entry.by == "deepspeed" else ""))


def _known(value: object) -> str:
    return "-" if value is None else str(value)
