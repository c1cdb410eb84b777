"""`meta.pt`: everything of a checkpoint that is not a tensor of the model or the optimizer."""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint.agreement import in_words
from meshbolt.checkpoint.local import files_at
from meshbolt.checkpoint.manifest import FileRecord
from meshbolt.checkpoint.storage import Files, read_file, write_file
from meshbolt.errors import CheckpointError

FILE_NAME = "meta.pt"
# Scripts keep their arguments in what they save. To build one sets its attributes, and runs nothing.
PLAIN_CLASSES: tuple[type, ...] = (argparse.Namespace,)


@dataclass(frozen=True)
class PackedObjects:
    """The file's content: objects as they were when it was made, whatever becomes of them.

    Attributes:
        content: what is written.
    """

    content: memoryview


def write_objects(files: Path | Files, objects: Mapping[str, object] | PackedObjects) -> FileRecord:
    """Write the file, have it on the storage, and return what the manifest says of it.

    Raises:
        CheckpointError: something in it cannot be pickled, or is a sharded tensor.
    """
    packed = objects if isinstance(objects, PackedObjects) else pack_objects(objects)
    write_file(files_at(files), FILE_NAME, packed.content)
    return FileRecord.of(packed.content)


def pack_objects(objects: Mapping[str, object]) -> PackedObjects:
    """Return objects as the file will hold them.

    Raises:
        CheckpointError: something among them cannot be pickled, or is a sharded tensor.
    """
    for key, value in objects.items():
        _refuse_sharded(value, where=f"objects[{key!r}]")
    content = io.BytesIO()
    try:
        torch.save(dict(objects), content)
    except Exception as error:  # pickle raises whatever the objects' own hooks raise
        raise CheckpointError(f"{_culprit(objects)} cannot be pickled ({in_words(error)}); leave it out") from error
    return PackedObjects(content.getbuffer())


def read_objects(files: Path | Files, *, weights_only: bool | None, record: FileRecord | None = None) -> dict[str, Any]:
    """Read the file, tensors to the CPU.

    Args:
        files: the checkpoint's directory, or its files.
        weights_only: False builds objects of any class, which runs code from the file; else plain data only.
        record: what the manifest says of the file, to compare it with; None reads it as it is.

    Raises:
        CheckpointError: it holds objects of classes and `weights_only` does not allow them, or it is damaged.
    """
    content = read_file(files_at(files), FILE_NAME)
    if record is not None:
        record.check(content, name=FILE_NAME)
    try:
        with torch.serialization.safe_globals(list(PLAIN_CLASSES)):
            objects = torch.load(io.BytesIO(content), map_location="cpu", weights_only=weights_only is not False)
    except Exception as error:  # of a damaged file, errors of almost every class
        classes = _refused_classes(content) if isinstance(error, pickle.UnpicklingError) else []
        if not classes:
            raise CheckpointError(f"its {FILE_NAME} cannot be read ({in_words(error)})") from error
        raise CheckpointError(
            f"{FILE_NAME} holds objects of the classes {', '.join(classes)}, and to build them is to run their code. "
            "If you trust this checkpoint, give weights_only=False to what loads it (trainer.fit, trainer.validate, fabric.load; "
            "--weights_only=false of a command), or allow the classes by torch.serialization.add_safe_globals"
        ) from error
    if not isinstance(objects, dict):
        raise CheckpointError(f"{FILE_NAME} holds a {type(objects).__name__} instead of a dictionary: it is damaged")
    return objects


def _refuse_sharded(value: object, *, where: str) -> None:
    if isinstance(value, DTensor):
        raise CheckpointError(
            f"{where} is a sharded tensor, of which one rank has a part only; save it among the tensors"
        )
    entries = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, entry in entries:
        _refuse_sharded(entry, where=f"{where}[{key!r}]")


def _refused_classes(content: bytes) -> list[str]:
    try:
        with torch.serialization.safe_globals(list(PLAIN_CLASSES)):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)))
    except Exception:  # it is damaged, and not for its classes that it was refused
        return []


def _culprit(objects: Mapping[str, object]) -> str:
    for key, value in objects.items():
        try:
            torch.save(value, io.BytesIO())
        except Exception:  # this is the one, whatever it raises
            return f"objects[{key!r}]"
    return "something among the objects"
