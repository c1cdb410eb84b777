"""`meshbolt checkpoint inspect`: what a checkpoint holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jsonargparse
import torch

from meshbolt.callbacks.console import print_table
from meshbolt.checkpoint import is_checkpoint
from meshbolt.checkpoint.deepspeed import is_deepspeed, open_deepspeed
from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.checkpoint.optimizers import OWN
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.cli.checkpoint import deepspeed
from meshbolt.cli.checkpoint.arguments import add_weights_only, parser_of
from meshbolt.cli.checkpoint.told import tell_json
from meshbolt.cli.commands import DONE
from meshbolt.errors import CheckpointError
from meshbolt.units import format_bytes

_TENSOR_COLUMNS = ("tensor", "dtype", "shape", "size")
_SHOWN = ("epoch", "global_step", "pytorch-lightning_version")


def run(arguments: Sequence[str]) -> int:
    """Print what a checkpoint holds.

    Args:
        arguments: "inspect", then the checkpoint and flags.

    Raises:
        CheckpointError: it cannot be read.
    """
    parser = parser_of(
        "inspect",
        usage="CKPT [--tensors] [--weights-only false] [--json]",
        description="Show what a checkpoint holds and what wrote it, without reading a tensor; of DeepSpeed's directories, too.",
        example="run.ckpt --tensors",
    )
    parser.add_argument("checkpoint", help="its directory")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    add_weights_only(parser)
    options = parser.parse_args(list(arguments[1:]))
    if not is_checkpoint(options.checkpoint) and is_deepspeed(options.checkpoint):
        _show_deepspeeds(options)
        return DONE
    with CheckpointReader(options.checkpoint) as reader:
        objects = _plain_objects(reader, weights_only=options.weights_only)
        if options.json:
            tell_json(described(reader, tensors=options.tensors, objects=objects))
            return DONE
        print_table("checkpoint", columns=("", ""), rows=_summary(reader, objects))
        print_table("tensors by entry", columns=("entry", "tensors", "size"), rows=_entries(reader))
        if options.tensors:
            rows = [
                (key, _dtype(info), _shape(info), format_bytes(info.num_bytes)) for key, info in reader.tensors.items()
            ]
            print_table("tensors", columns=_TENSOR_COLUMNS, rows=rows)
        if plan := reader.manifest.plan:
            print_table("plan", columns=("", ""), rows=[(key, str(value)) for key, value in plan.items()])
    return DONE


def _show_deepspeeds(options: jsonargparse.Namespace) -> None:
    tensors = options.tensors
    opened = open_deepspeed(options.checkpoint, weights_only=options.weights_only)
    content = deepspeed.described(opened, tensors=tensors)
    if options.json:
        tell_json(content)
        return
    print_table("checkpoint", columns=("", ""), rows=deepspeed.summary(opened))
    rows = [(key, str(each["tensors"]), format_bytes(each["bytes"])) for key, each in content["entries"].items()]
    print_table("tensors by entry", columns=("entry", "tensors", "size"), rows=rows)
    if tensors:
        infos = {
            name: TensorInfo(shape=tuple(each.shape), dtype=each.dtype)
            for name, each in opened.weights.items()
            if isinstance(each, torch.Tensor)
        }
        listed = [(name, _dtype(info), _shape(info), format_bytes(info.num_bytes)) for name, info in infos.items()]
        print_table("tensors", columns=_TENSOR_COLUMNS, rows=listed)


def described(reader: CheckpointReader, *, tensors: bool, objects: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds as plain data.

    Args:
        reader: the checkpoint.
        tensors: list every one.
        objects: what is told of its objects; None: what is read of them without running code.
    """
    manifest = reader.manifest
    content: dict[str, Any] = {
        "path": reader.name,
        "world_size": manifest.world_size,
        "versions": dict(manifest.versions),
        "plan": dict(manifest.plan),
        "files": {name: record.num_bytes for name, record in manifest.files.items()},
        "entries": {key: {"tensors": count, "bytes": size} for key, (count, size) in _by_entry(reader).items()},
        "objects": _plain_objects(reader) if objects is None else dict(objects),
    }
    if tensors:
        content["tensors"] = {
            key: {"dtype": _dtype(info), "shape": list(info.shape), "bytes": info.num_bytes}
            for key, info in reader.tensors.items()
        }
    return content


def _summary(reader: CheckpointReader, objects: Mapping[str, Any]) -> list[tuple[str, str]]:
    manifest = reader.manifest
    size = sum(record.num_bytes for record in manifest.files.values())
    return [
        ("path", reader.name),
        ("files", f"{len(manifest.files)}, {format_bytes(size)}"),
        ("saved by", f"{manifest.world_size} ranks"),
        *((name, version) for name, version in sorted(manifest.versions.items())),
        *((key, str(value)) for key, value in objects.items() if key in _SHOWN),
    ]


def _plain_objects(reader: CheckpointReader, *, weights_only: bool = True) -> dict[str, Any]:
    """Return the numbers and words at the top of a checkpoint, and of everything else what kind it is."""
    try:
        objects = reader.objects(weights_only=weights_only)
    except CheckpointError as error:
        return {"not read": str(error)}
    return {
        key: value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
        for key, value in objects.items()
        if key != OWN
    }


def _entries(reader: CheckpointReader) -> list[tuple[str, str, str]]:
    return [(key, str(count), format_bytes(size)) for key, (count, size) in _by_entry(reader).items()]


def _by_entry(reader: CheckpointReader) -> dict[str, tuple[int, int]]:
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for key, info in reader.tensors.items():
        sizes[key.partition(".")[0]].append(info.num_bytes)
    return {key: (len(found), sum(found)) for key, found in sizes.items()}


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _shape(info: TensorInfo) -> str:
    return " x ".join(map(str, info.shape)) or "-"
