"""torch's distributed checkpoint (DCP): a directory that `torch.distributed.checkpoint.load` reads, and its own tools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from meshbolt.checkpoint import manifest
from meshbolt.checkpoint.agreement import in_words
from meshbolt.checkpoint.checksum import checksum_of
from meshbolt.checkpoint.directory import sync_directory
from meshbolt.checkpoint.foreign import DcpReader
from meshbolt.checkpoint.formats.options import ExportOptions, OnBytes, Readable, Source
from meshbolt.checkpoint.formats.safetensors import weights_only_objects
from meshbolt.checkpoint.lazy import LazyTensor
from meshbolt.checkpoint.local import LocalFiles
from meshbolt.checkpoint.manifest import Chunk
from meshbolt.checkpoint.metadata import FILE_NAME
from meshbolt.checkpoint.objects import FILE_NAME as OBJECTS_FILE
from meshbolt.checkpoint.objects import read_objects
from meshbolt.checkpoint.optimizers import OWN, by_name, sharded_keys
from meshbolt.checkpoint.shard_writer import ShardWriter
from meshbolt.checkpoint.tree import join_tensors, markers, split_tensors
from meshbolt.errors import CheckpointError

OPTIONS = frozenset({"weights_only"})

# Where weights are in the state dicts that Lightning's strategies save, and one optimizer's state.
_WEIGHTS = ("state_dict", "model")
_OPTIMIZER = re.compile(r"optimizer_\d+")


class DcpWriter:
    """Writes everything that a checkpoint holds as one nested state dict."""

    def __init__(self, reader: Readable, options: ExportOptions) -> None:
        """Read what is no tensor.

        Args:
            reader: the checkpoint; stays open until it is written.
            options: how objects are read.

        Raises:
            CheckpointError: it holds objects of classes that the options do not allow.
        """
        self._reader = reader
        self._objects = reader.objects(weights_only=options.weights_only)
        self.num_tensors = len(reader.tensors)
        self.num_bytes = sum(info.num_bytes for info in reader.tensors.values())
        self.notes: tuple[str, ...] = ()

    def write(self, out: Path, *, on_bytes: OnBytes) -> None:
        """Write the directory."""
        tensors = {key: self._lazy(key, on_bytes) for key in self._reader.tensors}
        tree = {key: join_tensors(_with_lists(value), tensors) for key, value in self._objects.items() if key != OWN}
        named = set(markers(self._objects))
        beside = {key: tensor for key, tensor in tensors.items() if key not in named}
        # DCP makes text of all keys and forgets empty dictionaries; in a tuple they stay what they are, for an import.
        whole = {**tree, **beside, OWN: (self._objects,)}
        out.mkdir()
        with _plain_errors():
            dcp_save(whole, storage_writer=_StreamedWriter(LocalFiles(out), rank=0), no_dist=True)
        sync_directory(out)

    def _lazy(self, key: str, on_bytes: OnBytes) -> LazyTensor:
        def read() -> torch.Tensor:
            tensor = self._reader.read(key)
            on_bytes(tensor.nbytes)
            return tensor

        return LazyTensor(read, info=self._reader.tensors[key], keeps_parts=False)


def _with_lists(tree: Any) -> Any:
    """Return a tree with lists in the place of tuples that hold tensors, which DCP would not look into."""
    if isinstance(tree, Mapping):
        return {key: _with_lists(value) for key, value in tree.items()}
    return list(map(_with_lists, tree)) if type(tree) in (list, tuple) and markers(tree) else tree


class _StreamedWriter(ShardWriter):
    """Writes objects too. Torch's own writer keeps every tensor that it has written until the file is closed."""

    def write_item(self, stream: IO[bytes], data: torch.Tensor | io.BytesIO, item: WriteItem, *, offset: int) -> Chunk:
        """Write a tensor or the bytes of an object."""
        if isinstance(data, torch.Tensor):
            return super().write_item(stream, data, item, offset=offset)
        content = data.getvalue()
        stream.write(content)
        return Chunk(offset, len(content), 0, checksum_of(content))


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # DCP warns whoever has no process group that it takes him for a single process.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:  # no `Exception`: whoever catches those would miss it
        failure = next(failure for failure, _ in error.failures.values())
        if not isinstance(failure, Exception):
            raise failure from None  # an interrupt stays one
        raise CheckpointError(f"The export could not be written: {in_words(failure)}.") from error


# Import ---------------------------------------------------------------------------------------------------------------


def recognises(path: Path) -> bool:
    """Return whether a path is a directory of DCP, and no checkpoint of meshbolt's."""
    return (path / FILE_NAME).is_file() and not (path / manifest.FILE_NAME).exists()


def read(path: Path, *, prefix: str, weights_only: bool | None) -> Source:
    """Return what a directory of DCP holds as a checkpoint.

    Known are what `export --to dcp` writes, what Lightning's own strategies write, and a state dict of weights.

    Args:
        path: the directory.
        prefix: what is put before each weight's name.
        weights_only: False builds objects of any class, which runs code from the files; else plain data only.

    Raises:
        CheckpointError: it cannot be read, or holds no weights.
    """
    with ExitStack() as closing:
        reader = closing.enter_context(DcpReader(path))
        flat: dict[str, Any] = {key: reader.lazy(key, keeps_parts=False) for key in reader.tensors}
        others = reader.objects(weights_only=weights_only)
        if OWN in others and not prefix:
            found = Source(tensors=flat, objects=others[OWN][0])
        else:
            found = _foreign(_nested({**flat, **others}, reader.metadata.planner_data), path, prefix, weights_only)
        opened = closing.pop_all()
    return dataclasses.replace(found, closing=opened)


def _foreign(tree: dict[str, Any], path: Path, prefix: str, weights_only: bool | None) -> Source:
    tree.pop(OWN, None)
    beside = read_objects(path, weights_only=weights_only) if (path / OBJECTS_FILE).exists() else {}
    weights = next((tree.pop(key) for key in _WEIGHTS if isinstance(tree.get(key), Mapping)), None)
    if weights is None:
        weights = {key: tree.pop(key) for key, value in list(tree.items()) if isinstance(value, torch.Tensor)}
    if not weights:
        raise CheckpointError(
            f"{str(path)!r} has no weights where they are looked for: under {' or '.join(_WEIGHTS)}, or as a flat state dict. "
            f"Its entries: {', '.join(sorted(tree))}."
        )
    checkpoint = {**weights_only_objects({}), **beside, **tree}
    checkpoint["state_dict"] = {f"{prefix}{name}": value for name, value in weights.items()}
    states = [checkpoint.pop(key) for key in sorted(filter(_OPTIMIZER.fullmatch, tree), key=_number)]
    if states or "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = list(map(_with_numbers, states or checkpoint["optimizer_states"]))
    checkpoint, notes = by_name(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    objects = {key: split_tensors(value, key, tensors) for key, value in checkpoint.items()}
    return Source(tensors=tensors, objects={**objects, OWN: {"sharded": sharded_keys(objects, tensors)}}, notes=notes)


def _number(key: str) -> int:
    return int(key.rpartition("_")[2])


def _nested(flat: Mapping[str, Any], paths: Any) -> dict[str, Any]:
    """Return entries in the nested form that they were saved in.

    Args:
        flat: by the key that DCP gave them.
        paths: where each belongs, as DCP's planner keeps it; None where it was flat.
    """
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        set_element(tree, tuple((paths or {}).get(key, (key,))), value)
    return tree


def _with_numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer with numbers where DCP has made them text."""
    numbered = any(isinstance(each, int) for group in state["param_groups"] for each in group["params"])
    return {**state, "state": {int(key) if numbered else key: value for key, value in state["state"].items()}}
