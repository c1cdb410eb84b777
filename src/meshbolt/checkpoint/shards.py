"""The tensors of a checkpoint, planned by torch's distributed checkpoint (DCP) and written and read by us.

Each rank writes its own parts of sharded tensors; what several ranks have whole is written by one of them. DCP plans
that over the ranks' group, and reads any layout into any other. Here stands what it needs around it: the files, with
checksums; typed errors that name the file; metadata that is no code; and silence.

A load reads and verifies all that a rank needs first, and fills the tensors only when every rank has done so. Until then
the values wait where `staging.py` keeps them: in the system's cache of local files, at no other cost; of other storage,
and without verification, in as much memory on the CPU as the rank's part of what is loaded takes in the dtypes that it
was saved in. Tensors that are marked as fresh are filled while the files are read.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint.agreement import Ranks, in_words, kind_of, lost_contact, summary
from meshbolt.checkpoint.local import files_at
from meshbolt.checkpoint.manifest import FILE_NAME, FileRecord, Manifest, parse_manifest
from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.checkpoint.planners import PartsToLoad, PartsToSave
from meshbolt.checkpoint.shard_reader import ShardReader
from meshbolt.checkpoint.shard_writer import ShardWriter
from meshbolt.checkpoint.storage import Files, read_file
from meshbolt.compat import sections_of
from meshbolt.errors import CheckpointError


@dataclass(frozen=True)
class Written:
    """What one rank wrote.

    Attributes:
        files: by name; the first rank's include DCP's metadata.
        placements: by key, how the tensors are laid out that this rank wrote the beginning of.
        metadata: what DCP knows of the tensors of all ranks.
    """

    files: Mapping[str, FileRecord]
    placements: Mapping[str, str]
    metadata: Metadata


def info_of(key: str, tensor: Any) -> TensorInfo:
    """Return shape and dtype of a tensor that is to be written or filled.

    Raises:
        CheckpointError: it is no tensor with values of its own.
    """
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{key!r} is a {type(tensor).__name__}; tensors are saved here, other values as objects")
    if tensor.is_meta:
        raise CheckpointError(f"{key!r} is on the meta device and has no values; materialise the model first")
    if tensor.layout != torch.strided:
        raise CheckpointError(
            f"{key!r} is {tensor.layout}, and dense tensors are saved here; convert it with to_dense(), or leave it out"
        )
    if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(f"{key!r} is a sum that is not reduced yet ({tensor.placements}); reduce it first")
    return TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)


def write_shards(
    files: Path | Files,
    *,
    tensors: Mapping[str, torch.Tensor],
    ranks: Ranks,
    failing: str,
    on_stored: Callable[[], None] | None = None,
) -> Written:
    """Write this rank's part of the tensors and have it on the storage; a collective of all ranks.

    Args:
        files: where to, without any shards yet.
        tensors: by key; a plain tensor under a key of several ranks is the same on each.
        ranks: who writes.
        failing: how an error's message begins.
        on_stored: called once this rank has written what has its values not in memory (`StoredTensor`), which comes first.

    Returns:
        What this rank wrote.

    Raises:
        CheckpointError: some rank could not write; the same on every rank that lives.
    """
    writer = ShardWriter(files_at(files), rank=ranks.rank, on_stored=on_stored)
    with _errors_of_dcp(ranks, failing=failing):
        metadata = dcp_save(dict(tensors), storage_writer=writer, planner=PartsToSave(), process_group=ranks.group)
    placements = {key: placement_of(tensors[key]) for key in writer.begun}
    return Written(writer.records, placements, metadata)


def read_shards(
    files: Path | Files,
    *,
    metadata: Metadata,
    into: Mapping[str, torch.Tensor],
    ranks: Ranks,
    failing: str,
    manifest: Manifest | None = None,
    verify: bool = True,
    fresh: Collection[str] = (),
    reading: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    check: Callable[[], None] | None = None,
) -> None:
    """Fill this rank's tensors from a checkpoint, whatever layout it was written in; a collective of all ranks.

    Args:
        files: the checkpoint's.
        metadata: what `read_metadata` gave for it.
        into: the tensors by key, all of them in the checkpoint and of its shapes.
        ranks: who reads.
        failing: how an error's message begins.
        manifest: the checkpoint's; None reads it, from beside the files.
        verify: compare the checksums of what is read.
        fresh: keys of tensors that nobody has used yet, which may be filled in part where the load fails.
        reading: entered around what this rank reads, to look at its errors.
        check: what else has to be right on every rank before tensors are filled.

    Raises:
        CheckpointError: some rank could not read; the same on every rank that lives. No tensor has changed but those
            that are fresh.
    """
    found = files_at(files)
    known = manifest or parse_manifest(read_file(found, FILE_NAME))
    reader = ShardReader(found, manifest=known, metadata=metadata, verify=verify, fresh=fresh, reading=reading)
    planner = PartsToLoad(flatten_state_dict=False)
    with _errors_of_dcp(ranks, failing=failing):
        dcp_load(dict(into), storage_reader=reader, planner=planner, process_group=ranks.group)
    if check is not None:
        ranks.each(check, failing=failing)
    reader.fill()


def placement_of(tensor: torch.Tensor) -> str:
    """Return in words how a tensor lies on the ranks.

    Example:
        >>> placement_of(torch.ones(2))
        'whole'
    """
    if not isinstance(tensor, DTensor):
        return "whole"
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or tuple(f"axis{number}" for number in range(mesh.ndim))
    sections = sections_of(tensor)
    words = [_words(placement, sections.get(axis)) for axis, placement in enumerate(tensor.placements)]
    axes = zip(words, names, mesh.mesh.shape, strict=True)
    return ", ".join(f"{placement} over {name}={size}" for placement, name, size in axes)


def _words(placement: Any, sections: int | None) -> str:
    if sections is None:
        return repr(placement)
    return f"Shard(dim={placement.dim})" + (f" of each of {sections} sections" if sections > 1 else "")


@contextlib.contextmanager
def _errors_of_dcp(ranks: Ranks, *, failing: str) -> Iterator[None]:
    try:
        with _alone_on_purpose() if ranks.alone else contextlib.nullcontext():
            yield
    except CheckpointException as error:
        raise _converted(error, ranks=ranks, failing=failing) from error
    except Exception as error:  # every failure of a rank's own part comes as the above: what is left is the exchange
        raise lost_contact(error, failing=failing) from error


def _converted(error: CheckpointException, *, ranks: Ranks, failing: str) -> BaseException:
    failures = {rank: failure for rank, (failure, _) in error.failures.items()}
    own = failures.get(ranks.rank)
    if own is not None and not isinstance(own, Exception):
        return own  # an interrupt of this rank stays one
    texts = [in_words(failures[rank]) if rank in failures else None for rank in range(ranks.size)]
    return kind_of(failures.values())(f"{failing}: {summary(texts)}")


@contextlib.contextmanager
def _alone_on_purpose() -> Iterator[None]:
    # DCP warns whoever has no process group that it takes him for a single process.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
