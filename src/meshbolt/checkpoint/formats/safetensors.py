"""safetensors: weights and nothing else, in files that run no code when they are read.

A file is the length of a header, the header as JSON, and the memory of the tensors one after the other. It is written here
tensor by tensor: the library's own writer takes a whole file's tensors at once, and copies them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from meshbolt.checkpoint.chunks import bytes_of
from meshbolt.checkpoint.directory import sync_directory, write_synced
from meshbolt.checkpoint.formats.options import ExportOptions, OnBytes, Readable, Source
from meshbolt.checkpoint.formats.weights import exported_infos, exported_names, read_exported
from meshbolt.checkpoint.lazy import LazyTensor
from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.checkpoint.optimizers import OWN
from meshbolt.checkpoint.tree import MARKER
from meshbolt.errors import CheckpointError, UnsupportedError

OPTIONS = frozenset({"max_shard_bytes", "weights", "everything", "strip_prefix", "dtype"})
SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"

# As the library names them.
_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.complex64: "C64",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class SafetensorsWriter:
    """Writes one file, or a directory of shards with an index as Hugging Face lays it out."""

    def __init__(self, reader: Readable, options: ExportOptions) -> None:
        """Plan the shards.

        Args:
            reader: the checkpoint; stays open until it is written.
            options: what is exported.

        Raises:
            ConfigError: there is nothing to export.
            UnsupportedError: a tensor has a dtype that the format does not have.
        """
        self._reader = reader
        self.keys = exported_names(reader, options)
        self.infos = exported_infos(reader, self.keys, options)
        self.notes: tuple[str, ...] = ()
        if strange := [f"{name}: {info}" for name, info in self.infos.items() if info.dtype not in _NAMES]:
            raise UnsupportedError(
                f"safetensors has no dtype for {', '.join(strange[:5])}. Cast with dtype, or export to another format."
            )
        self._max_shard_bytes = options.max_shard_bytes
        self.num_tensors = len(self.infos)
        self.num_bytes = sum(info.num_bytes for info in self.infos.values())

    def write(self, out: Path, *, on_bytes: OnBytes) -> None:
        """Write a directory."""
        out.mkdir()
        shards = divide(self.infos, max_shard_bytes=self._max_shard_bytes)
        files = shard_names(len(shards))
        for file, names in zip(files, shards, strict=True):
            self._write_file(out / file, names, on_bytes=on_bytes)
        if len(files) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_synced(out / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        sync_directory(out)

    def _write_file(self, file: Path, names: list[str], *, on_bytes: OnBytes) -> None:
        with file.open("xb") as stream:
            # As the library does: wide elements first, so that each begins at a multiple of its width.
            ordered = sorted(names, key=lambda name: (-self.infos[name].dtype.itemsize, name))
            stream.write(header({name: self.infos[name] for name in ordered}))
            for name in ordered:
                tensor = read_exported(self._reader, self.keys[name], self.infos[name])
                stream.write(bytes_of(tensor))
                on_bytes(tensor.nbytes)
                del tensor
            stream.flush()
            os.fsync(stream.fileno())


class SafetensorsFileWriter(SafetensorsWriter):
    """Writes a single file, however large."""

    def write(self, out: Path, *, on_bytes: OnBytes) -> None:
        """Write the file."""
        self._write_file(out, list(self.infos), on_bytes=on_bytes)


def divide(infos: Mapping[str, TensorInfo], *, max_shard_bytes: int) -> list[list[str]]:
    """Return the names of each shard: in order, as many as go into one; a larger tensor has a shard of its own.

    Args:
        infos: of the tensors, by name.
        max_shard_bytes: what goes into a shard.
    """
    shards: list[list[str]] = []
    room = 0
    for name, info in infos.items():
        num_bytes = info.num_bytes
        if not shards or num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= num_bytes
    return shards or [[]]


def shard_names(count: int) -> list[str]:
    """Return the files' names as Hugging Face has them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def header(infos: Mapping[str, TensorInfo]) -> bytes:
    """Return what a file begins with.

    Args:
        infos: of its tensors, in the order in which they follow.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, info in infos.items():
        end = at + info.num_bytes
        content[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# Import ---------------------------------------------------------------------------------------------------------------


def recognises(path: Path) -> bool:
    """Return whether a path is a file of safetensors, or a directory with some."""
    return (path.is_file() and path.suffix == SUFFIX) or (path.is_dir() and any(path.glob(f"*{SUFFIX}")))


def safetensors_files(path: Path) -> list[Path]:
    """Return the files of weights at a path: itself, those that an index names, or all in a directory.

    Args:
        path: a file, or a directory.

    Raises:
        CheckpointError: there are none, or one that the index names is missing.
    """
    if path.is_file():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        listed = json.loads(indices[0].read_text())["weight_map"].values()
        files = sorted({path / name for name in listed})
    else:
        files = sorted(path.glob(f"*{SUFFIX}"))
    absent = [str(file) for file in files if not file.is_file()]
    if absent or not files:
        raise CheckpointError(
            f"{path} has no weights to load: {'the index names ' + ', '.join(absent[:3]) if absent else 'no .safetensors file'}. "
            "Give the path of a .safetensors file, or of a complete directory."
        )
    return files


def read(path: Path, *, prefix: str, weights_only: bool | None) -> Source:
    """Return weights as a checkpoint of weights only.

    Args:
        path: a file, or a directory.
        prefix: what is put before each name.
        weights_only: nothing depends on it: these files hold no objects.

    Raises:
        CheckpointError: a file cannot be read, or two hold tensors of one name.
    """
    found: dict[str, torch.Tensor] = {}
    for file in safetensors_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: _lazy(opened, name, file=file) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}.") from error
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{path} has {twice[0]!r} in two files. Give one of them, or a directory with an index."
            )
        found.update(tensors)
    keys = {f"{prefix}{name}": f"state_dict.{prefix}{name}" for name in found}
    objects = {
        **weights_only_objects({name: {MARKER: key} for name, key in keys.items()}),
        OWN: {"sharded": sorted(keys.values())},
    }
    return Source(tensors=dict(zip(keys.values(), found.values(), strict=True)), objects=objects)


def weights_only_objects(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Lightning's checkpoint of weights only holds.

    Args:
        state_dict: its weights, or their markers.
    """
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": dict(state_dict),
    }


def _lazy(opened: Any, name: str, *, file: Path) -> LazyTensor:
    part = opened.get_slice(name)
    dtype = _DTYPES.get(part.get_dtype())
    if dtype is None:
        raise UnsupportedError(f"{name!r} has the dtype {part.get_dtype()}, which is not imported. Cast it first.")

    def values() -> torch.Tensor:
        # Opened anew: what was read stays mapped, and counts as memory, as long as the file is open.
        with safe_open(file, framework="pt") as again:
            tensor: torch.Tensor = again.get_tensor(name)
        return tensor

    return LazyTensor(values, info=TensorInfo(shape=tuple(part.get_shape()), dtype=dtype), keeps_parts=False)
