"""Save a checkpoint: written aside, made whole, then given its name."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint import directory, manifest, shards
from meshbolt.checkpoint.agreement import Ranks, in_words
from meshbolt.errors import CheckpointError

OBJECTS_FILE = "meta.pt"


def save_directory(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, torch.Tensor],
    objects: Mapping[str, object],
    plan: Mapping[str, object] | None = None,
    versions: Mapping[str, str] | None = None,
    keep_partial: bool = False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Save a checkpoint; a collective of all ranks, which returns when the checkpoint is whole and on the disk.

    A checkpoint that is there already is replaced in one step, when the new one is whole; whatever goes wrong before, it
    stays. A single file of the same name is replaced as well.

    Args:
        path: the directory to make, the same on every rank, on a file system that all ranks share.
        tensors: by key. Of a DTensor each rank saves its own part. A plain tensor under a key of several ranks is the same
            on each and saved once; a key may exist on one rank only.
        objects: everything else, as `torch.save` takes it; the first rank's are saved.
        plan: what the run was told to do, as plain data, for the manifest.
        versions: of packages beyond torch and meshbolt, for the manifest.
        keep_partial: where the save fails, keep what was written.
        group: the ranks that save, with a CPU backend; None for all, or for a single process.

    Raises:
        CheckpointError: some rank could not save; the same on every rank that lives.
        UnsupportedError: the path is a URL, or the group has no CPU backend.
    """
    ranks = Ranks(group)
    target = directory.local_path(path)
    failing = f"Checkpoint {str(target)!r} cannot be saved"
    save_id = ranks.each(directory.new_save_id, failing=failing)[0]
    partial = directory.partial_of(target, save_id=save_id)
    try:
        ranks.each(lambda: _prepare(target, partial, tensors, objects, plan, ranks, keep_partial), failing=failing)
        shards.write_shards(partial, tensors=tensors, ranks=ranks, failing=failing)
        parts = ranks.each(lambda: _finish_part(partial, ranks), failing=failing)
        whole = manifest.Manifest(
            save_id=save_id,
            world_size=ranks.size,
            versions={**manifest.own_versions(), **(versions or {})},
            plan=plan or {},
            files={name: num_bytes for part in parts for name, num_bytes in part.items()},
        )
        ranks.each(lambda: _commit(target, partial, whole, ranks), failing=failing)
    finally:
        # After a commit, what has this name now is the checkpoint that was replaced.
        if ranks.first and not (keep_partial and ...):
            directory.discard(partial)
